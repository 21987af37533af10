"""`make install` and `make uninstall` on bare Debian 12, 13 and forky."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.nodes import installed

if TYPE_CHECKING:
    from pathlib import Path

    from tests.nodes.node import Node

# Directories that make, pip or the system may leave; all else must go again.
WATCHED = ("/usr/local", "/etc", "/opt", "/root", "/var/lib", "/var/cache")


def files(node: Node) -> set[str]:
    """Every file in the watched directories of the node."""
    root: Path = node.path("/")
    return {
        str(path.relative_to(root))
        for top in WATCHED
        for path in node.path(top).rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["12", "13", "forky"])
def test_install_and_uninstall(name: str) -> None:
    with installed.installing_node(name) as node:
        before = files(node)
        mine = node.path("/etc/containerd/grit.toml")
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("# the administrator's\n")

        installed.make(node, "install")

        # found where containerd looks, and answering without a word on standard error
        version = node.run(["containerd-shim-grit-v1", "-v"])
        assert version.stdout.startswith("containerd-shim-grit-v1:")
        assert version.stderr == ""
        help_text = node.run([f"{installed.ENVIRONMENT}/libexec/cuda-checkpoint", "-h"]).stdout
        assert "--action" in help_text  # what CRIU's plugin looks for
        assert "gritctl, version" in node.run(["gritctl", "--version"]).stdout
        assert "doctor" in node.run(["gritctl", "--help"]).stdout  # imports every subcommand
        packages = "import cffi, google.protobuf, grpc, shim"
        node.run([f"{installed.ENVIRONMENT}/bin/python", "-c", packages])
        assert node.path("/etc/containerd/grit.toml.example").exists()
        # the interpreter itself, not a link that an upgrade turns, with everything compiled
        launcher = node.path(installed.SHIM).read_text()
        interpreter = launcher.rpartition("exec ")[2].split()[0]
        assert node.path(interpreter).is_file() and not node.path(interpreter).is_symlink()
        sources = list(node.path(f"{installed.ENVIRONMENT}/lib").rglob("site-packages/shim/*.py"))
        assert sources
        for source in sources:
            assert list((source.parent / "__pycache__").glob(f"{source.stem}.*.pyc"))

        installed.make(node, "install")  # again: an upgrade

        installed.make(node, "uninstall")
        assert files(node) - before == {"etc/containerd/grit.toml"}
        assert mine.read_text() == "# the administrator's\n"
        installed.make(node, "uninstall")  # again: nothing to do
