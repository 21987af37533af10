"""Makes what is installed without a network: a Debian package, and the same files as a tree for
other systems. What `make package` runs.

Both hold the program and no Python packages: cffi's backend and xxhash are the system's (Debian:
python3-cffi-backend, python3-xxhash), the interpreter is /usr/bin/python3. `install.py` is the
other way, with a virtual environment of its own.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from install import CRIU_COMMAND, NAME, SHIM, SOURCE, launcher

sys.path.insert(0, str(SOURCE))
from shim import __version__

PYTHON = "/usr/bin/python3"

CONTROL = f"""\
Package: {NAME}
Version: {__version__}
Architecture: all
Maintainer: the containerd-shim-grit authors
Section: admin
Priority: optional
Depends: python3 (>= 3.11), python3-cffi-backend, python3-xxhash, containerd
Recommends: criu (>= 4.1), python3-zstandard
Suggests: python3-cryptography
Description: containerd shim that checkpoints and restores GPU containers
 A runtime shim for stock containerd, with which containers and pods that use NVIDIA GPUs are
 checkpointed and restored by the clients there are: ctr, nerdctl, the kubelet, GRIT's agent.
"""

# With systemd, containerd is restarted, for it reads its configuration at its start only.
POSTINST = f"""\
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
{PYTHON} -m compileall -q /usr/lib/{NAME}/lib
/usr/lib/{NAME}/configure enable
if [ -d /run/systemd/system ]; then systemctl try-restart containerd.service; fi
"""

PRERM = f"""\
#!/bin/sh
set -e
[ "$1" = remove ] || exit 0
/usr/lib/{NAME}/configure disable
find /usr/lib/{NAME} -name __pycache__ -type d -prune -exec rm -r {{}} +
"""

POSTRM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl try-restart containerd.service
fi
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="make the Debian package and the tree")
    parser.add_argument("directory", type=Path, help="where to put them")
    directory: Path = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    print(debian_package(directory))
    print(tree(directory))


def debian_package(directory: Path) -> Path:
    """`<directory>/containerd-shim-grit_<version>_all.deb`."""
    target = directory / f"{NAME}_{__version__}_all.deb"
    with tempfile.TemporaryDirectory() as draft:
        root = Path(draft)
        root.chmod(0o755)
        payload(root, "/usr")
        _write(root / "etc/containerd/grit.toml", (SOURCE / "packaging/grit.toml").read_text())
        documents = root / f"usr/share/doc/{NAME}"
        _write(documents / "copyright", (SOURCE / "LICENSE").read_text())
        changes = gzip.compress((SOURCE / "CHANGELOG.md").read_bytes(), mtime=0)
        (documents / "changelog.gz").write_bytes(changes)
        _write(root / "DEBIAN/control", CONTROL)
        _write(root / "DEBIAN/conffiles", "/etc/containerd/grit.toml\n")
        for name, script in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
            _write(root / "DEBIAN" / name, script, mode=0o755)
        words = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(target)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return target


def tree(directory: Path) -> Path:
    """`<directory>/containerd-shim-grit-<version>.tar.gz`, to be unpacked at /."""
    target = directory / f"{NAME}-{__version__}.tar.gz"
    with tempfile.TemporaryDirectory() as draft:
        root = Path(draft)
        payload(root, "/usr/local")
        example = root / "etc/containerd/grit.toml.example"
        _write(example, (SOURCE / "packaging/grit.toml").read_text())
        with tarfile.open(target, "w:gz") as tar:
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    tar.add(path, path.relative_to(root), filter=_owned_by_root)
    return target


def payload(root: Path, prefix: str) -> None:
    """The program below `root`, to be run at `prefix`."""
    home = f"{prefix}/lib/{NAME}"
    place = root / home.lstrip("/")
    packages = f"{home}/lib/python3/site-packages"
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "shim", root / packages.lstrip("/") / "shim", ignore=without)
    # By it the program knows its own root (shim/places.py).
    _write(place / "pyvenv.cfg", "include-system-site-packages = true\n")
    for folder in ("containerd", "kubernetes"):
        shutil.copytree(SOURCE / "packaging" / folder, place / folder)
    shutil.copy(SOURCE / "packaging/configure.py", place / "configure")
    (place / "configure").chmod(0o755)
    for directory, name, module in (
        (f"{prefix}/bin", SHIM, "shim.cli"),
        (f"{home}/libexec", CRIU_COMMAND, "shim.cuda.command"),
    ):
        text = launcher(name, module, PYTHON, packages)
        _write(root / directory.lstrip("/") / name, text, mode=0o755)


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def _owned_by_root(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = "root"
    return entry


if __name__ == "__main__":
    main()
