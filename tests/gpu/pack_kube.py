"""Packs what the tests with Kubernetes need on a machine with a GPU beside the kit of `pack`: the
API server for custom resources, etcd, kubectl, openssl, the image of a pod's sandbox, and the
wheels of the agent's and the tests' dependencies.

    python -m tests.gpu.pack_kube TARGET_DIRECTORY PYTHON_VERSION
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.e2e.pods.kubelet import PAUSE_COMMAND
from tests.gpu.pack import programs, wheels
from tests.nodes import apiserver
from tests.nodes.image import build_image

_WHEELS = ("kubernetes", "click", "rich", "grpcio", "protobuf", "grpcio-tools", "pyyaml")


def main() -> None:
    target, python = Path(sys.argv[1]), sys.argv[2]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        kit = Path(directory)
        programs(kit, apiserver.NODE, ("usr/bin/openssl",))
        for name in apiserver.BINARIES:  # of what is dynamic, glibc is all that they load
            shutil.copy2(apiserver.directory() / name, kit / "bin")
        shutil.copyfile(
            build_image("local/pause", "1", {}, command=PAUSE_COMMAND), kit / "pause.tar"
        )
        wheels(kit / "wheels", python, *_WHEELS)
        for wheel in (kit / "wheels").iterdir():
            _store(wheel)
        with tarfile.open(target / "kube.tar.xz", "w:xz", preset=6) as archive:
            archive.add(kit, ".")


def _store(wheel: Path) -> None:
    """Takes the wheel's own compression away: that of the archive is better."""
    with zipfile.ZipFile(wheel) as old:
        files = [(info.filename, old.read(info)) for info in old.infolist()]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as new:
        for name, content in files:
            new.writestr(name, content)


if __name__ == "__main__":
    main()
