"""A real Kubernetes API server for custom resources, with etcd and kubectl: what a node needs to be
a control plane without core resources.

The server is `k8s.io/apiextensions-apiserver` alone (`apiserver.go`), built from Debian's own Go
packages (sid has them) in a layer that is thrown away, in about five minutes on two processors; it
serves CRDs with validation, status, watch and finalizers, and knows no pods. `python -m
tests.nodes.apiserver` makes it.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.nodes import cache, downloads, roots
from tests.nodes.node import Node

NODE = "forky"
BINARIES = ("apiserver", "etcd", "kubectl")

_SOURCE = Path(__file__).with_suffix(".go")

# etcd and kubectl are of the node's own release, for they are linked to its C library.
_BUILD = """\
set -eu
cat > /tmp/apiserver.go
apt-get update -q
apt-get install -q -y --no-install-recommends etcd-server kubernetes-client
mkdir /built
cp /usr/bin/etcd /usr/bin/kubectl /built/
sed 's/ forky / sid /' /etc/apt/sources.list > /etc/apt/sources.list.d/sid.list
apt-get update -q
apt-get install -q -y --no-install-recommends golang-go golang-k8s-apiextensions-apiserver-dev
cd /tmp
GO111MODULE=off GOPATH=/usr/share/gocode GOFLAGS=-trimpath GOCACHE=/root/go-cache CGO_ENABLED=0 \\
    go build -ldflags '-s -w' -o /built/apiserver apiserver.go
"""


def directory() -> Path:
    """The host's directory that holds BINARIES, for node NODE."""
    root = roots.RECIPES[NODE].path.name
    path = cache.directory() / "apiserver" / f"{root}-{cache.digest(_BUILD, _SOURCE.read_text())}"
    return cache.entry(path, _build)


def _build(target: Path) -> None:
    with Node(NODE, network="host", binds=downloads.binds()) as node:
        node.run(
            ["sh", "-c", _BUILD],
            timeout=1800,
            input=_SOURCE.read_text(),
            env={**downloads.environment(), "DEBIAN_FRONTEND": "noninteractive"},
        )
        for name in BINARIES:
            shutil.copy(node.path(f"/built/{name}"), target / name)


if __name__ == "__main__":
    print(directory())
