"""The second kit, `make gpu-kube-kit`, on the machine with the GPU: HOME has its programs, and
PACKAGES what the agent and the tests import."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile

from tests.gpu import machine

ARCHIVE = machine.ARCHIVE.with_name("kube.tar.xz")
HOME = machine.HOME.with_name("grit-gpu-kube")
"""Not below the first kit's, which an installation of that one replaces."""
PACKAGES = HOME / "packages"


def there() -> bool:
    return ARCHIVE.exists() or HOME.exists()


def install() -> None:
    """Unpacks the kit, unless it was, and lets this process import from it."""
    if not (HOME / ".ready").exists():
        shutil.rmtree(HOME, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(HOME, filter="tar")
        wheels = map(str, sorted((HOME / "wheels").iterdir()))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--target", str(PACKAGES), *wheels], check=True)
        (HOME / ".ready").touch()
    sys.path.insert(0, str(PACKAGES))
