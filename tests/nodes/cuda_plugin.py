"""CRIU's CUDA plugin, which Debian does not ship, built from Debian's source of the same CRIU.

Built inside the node whose CRIU will load it, with the compilers in a layer that is thrown
away. `python -m tests.nodes.cuda_plugin` makes those of all nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.nodes import cache, downloads, roots
from tests.nodes.node import Node

if TYPE_CHECKING:
    from pathlib import Path

BUILD_PACKAGES = (
    "bzip2",
    "gcc",
    "libc6-dev",
    "libcap-dev",
    "libnet1-dev",
    "libnl-3-dev",
    "libprotobuf-c-dev",
    "libprotobuf-dev",
    "pkgconf",
    "protobuf-c-compiler",
    "protobuf-compiler",
    "uuid-dev",
    "xz-utils",
)

_BUILD = """\
set -eu
sed 's/^deb /deb-src /' /etc/apt/sources.list > /etc/apt/sources.list.d/source.list
apt-get update -q
apt-get install -q -y --no-install-recommends "$@"
cd /tmp
apt-get source -q --tar-only criu
tar -xf criu_*.orig.tar.*
cd criu-*/
make -j"$(nproc)" cuda_plugin
mkdir /plugin
cp plugins/cuda/cuda_plugin.so /plugin/
"""


def directory(name: str) -> Path:
    """The host's directory that holds `cuda_plugin.so` for the CRIU of node `name`."""
    root = roots.RECIPES[name].path.name
    path = cache.directory() / "plugins" / f"{root}-{cache.digest(_BUILD, BUILD_PACKAGES)}"
    return cache.entry(path, lambda draft: _build(name, draft))


def _build(name: str, target: Path) -> None:
    with Node(name, network="host", binds=downloads.binds()) as node:
        node.run(
            ["sh", "-c", _BUILD, "build", *BUILD_PACKAGES],
            timeout=900,
            env={**downloads.environment(), "DEBIAN_FRONTEND": "noninteractive"},
        )
        built = node.path("/plugin/cuda_plugin.so")
        (target / built.name).write_bytes(built.read_bytes())


if __name__ == "__main__":
    for name in ("13", "forky"):
        print(directory(name))
