"""Packs what a bare machine with an NVIDIA GPU lacks into one archive: Debian forky's containerd
2.1, runc and CRIU 4.2 and Debian 13's CRIU 4.1 with their libraries, the CUDA plugin for both, an
image, and the wheels of the shim's dependencies. Nothing of NVIDIA's is in it: that is on the
machine.

    python -m tests.gpu.pack TARGET_DIRECTORY PYTHON_VERSION     (3.12, say: the machine's python3)
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tests.nodes import cuda_plugin, roots
from tests.nodes.image import build_image

# Of glibc the machine has its own; Debian 13's programs need 2.38 or later.
_GLIBC = ("libc.so", "ld-linux", "libm.so", "libpthread.so", "libdl.so", "librt.so")
_PROGRAMS = (
    "usr/bin/containerd",
    "usr/bin/containerd-shim-runc-v2",
    "usr/bin/ctr",
    "usr/sbin/runc",
)
_WHEELS = ("cffi", "cryptography", "pycparser", "xxhash", "zstandard")


def main() -> None:
    target, python = Path(sys.argv[1]), sys.argv[2]
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        kit = Path(directory)
        programs(kit, "forky", _PROGRAMS)
        programs(kit / "criu-4.1", "13", ("usr/sbin/criu",))
        programs(kit / "criu-4.2", "forky", ("usr/sbin/criu",))
        for name, release in (("13", "criu-4.1"), ("forky", "criu-4.2")):
            shutil.copytree(cuda_plugin.directory(name), kit / release / "plugin")
        shutil.copyfile(build_image("local/busybox", "1", {}), kit / "busybox.tar")
        wheels(kit / "wheels", python, "--no-deps", *_WHEELS)
        with tarfile.open(target / "kit.tar.xz", "w:xz", preset=3) as archive:
            archive.add(kit, ".")


def programs(kit: Path, node: str, paths: tuple[str, ...]) -> None:
    """Copies programs of a node's root, and the libraries they load, to `bin` and `lib`."""
    root = roots.root(node)
    for part in ("bin", "lib"):
        (kit / part).mkdir(parents=True, exist_ok=True)
    for program in paths:
        shutil.copy2(root / program, kit / "bin")
        listed = subprocess.run(
            ["chroot", str(root), "ldd", f"/{program}"], check=True, capture_output=True, text=True
        )
        for line in listed.stdout.splitlines():
            _, arrow, rest = line.partition(" => ")
            library = rest.split(" ")[0]
            if arrow and not Path(library).name.startswith(_GLIBC):
                shutil.copy(root / library.lstrip("/"), kit / "lib")


def wheels(target: Path, python: str, *wanted: str) -> None:
    """Downloads what `pip download WANTED` names."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_28")]
    version = [f"--python-version={python}", "--implementation=cp", *platforms]
    subprocess.run([*pip, *version, f"--dest={target}", *wanted], check=True)


if __name__ == "__main__":
    main()
