"""Nodes with this tree's shim installed, as `make install` installs it.

The layer with the environment and its dependencies is made once for each node by the real
`make install`; what changes all the time, the package's own files, is laid over it afresh
for every node. (`tests/e2e/test_install.py` runs the real thing in bare nodes.)
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.nodes import cache, cuda_plugin, downloads, roots
from tests.nodes.node import Node

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = "/usr/src/containerd-shim-grit"
ENVIRONMENT = "/usr/local/lib/containerd-shim-grit"
SHIM = "/usr/local/bin/containerd-shim-grit-v1"
CUDA_PLUGIN = "/usr/local/lib/criu-cuda"
"""Where nodes 13 and forky have `cuda_plugin.so`; node 12's CRIU knows no such plugin."""
OLD = "1.6"
"""Debian 12 has containerd 1.6, but no CRIU that starts on current kernels; this node has both."""

# Whatever decides what is installed beside the package's own files.
_DECIDING = (
    "pyproject.toml",
    "Makefile",
    "packaging/install.py",
    "packaging/containerd-shim-grit-v1.sh",
)


def installing_node(name: str, **options: Any) -> Node:
    """A bare node that can run `make install` in SOURCE: it reaches what the host reaches."""
    binds = {SOURCE: REPOSITORY, **downloads.binds()}
    return Node(name, network="host", binds=binds, **options)


def make(node: Node, *words: str) -> str:
    """Runs `make ...` in SOURCE; returns what it printed."""
    done = node.run(["make", *words], cwd=SOURCE, env=downloads.environment(), timeout=300)
    return done.stdout + done.stderr


def layer(name: str) -> Path:
    """What `make install` puts on the bare node, as a layer to lie over its root."""
    texts = [(REPOSITORY / path).read_text() for path in _DECIDING]
    digest = cache.digest(roots.RECIPES[name].path, *texts)
    path = cache.directory() / "installed" / f"{name}-{digest}"
    return cache.entry(path, lambda draft: _make(name, draft))


def _make(name: str, draft: Path) -> None:
    with installing_node(name) as node:
        make(node, "install")
        shutil.copytree(node.path("/usr/local"), draft / "usr/local", symlinks=True)


def installed_node(name: str, **options: Any) -> Node:
    """Node `name` with the shim of this tree installed; `options` are those of `Node`. OLD is
    node 13 with containerd 1.6 in it.

    Use `refresh` after it stands. CRIU's CUDA plugin is at CUDA_PLUGIN.
    """
    if name == OLD:
        layers = [*options.pop("layers", ()), roots.old_containerd()]
        return installed_node("13", layers=layers, **options)
    binds = dict(options.pop("binds", {}))
    if name != "12":
        binds[CUDA_PLUGIN] = cuda_plugin.directory(name)
    layers = [layer(name), *options.pop("layers", ())]
    return Node(name, layers=layers, binds=binds, **options)


def refresh(node: Node) -> None:
    """Puts the package as it is in this tree now into the running node, compiled."""
    (packages,) = node.path(f"{ENVIRONMENT}/lib").glob("python3*/site-packages")
    shutil.rmtree(packages / "shim")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "shim", packages / "shim", ignore=ignore)
    inside = f"{ENVIRONMENT}/lib/{packages.parent.name}/site-packages/shim"
    python = f"{ENVIRONMENT}/bin/python"
    node.run([python, "-m", "compileall", "-q", inside])
