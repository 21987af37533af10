"""What the node agent needs beside the shim's own environment (the extra `agent`), as a directory
for PYTHONPATH; installed in the node whose Python will import it."""

from __future__ import annotations

import shutil
import tomllib
from typing import TYPE_CHECKING

from tests.nodes import cache, downloads, roots
from tests.nodes.installed import REPOSITORY, installing_node

if TYPE_CHECKING:
    from pathlib import Path

_INSTALL = """\
set -eu
python3 -m venv /tmp/pip
/tmp/pip/bin/pip install --quiet --target /packages "$@"
"""


def directory(name: str) -> Path:
    """The host's directory with the packages for node `name`."""
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["optional-dependencies"]["agent"]
    digest = cache.digest(_INSTALL, *wanted)
    path = cache.directory() / "agent" / f"{roots.RECIPES[name].path.name}-{digest}"
    return cache.entry(path, lambda draft: _install(name, wanted, draft))


def _install(name: str, wanted: list[str], target: Path) -> None:
    with installing_node(name) as node:
        words = ["sh", "-c", _INSTALL, "install", *wanted]
        node.run(words, timeout=300, env=downloads.environment())
        shutil.copytree(node.path("/packages"), target, symlinks=True, dirs_exist_ok=True)


if __name__ == "__main__":
    for name in ("13", "forky"):
        print(directory(name))
