"""An authority of a test's own, and certificates of it, by openssl."""

from __future__ import annotations

import subprocess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

_NEW = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]


def authority(directory: Path) -> None:
    """ca.crt and ca.key in `directory`, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    use = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    _openssl(
        directory, "req", "-x509", *_NEW, "-days", "2", "-subj", "/CN=tests-ca", *use,
        "-keyout", "ca.key", "-out", "ca.crt",
    )  # fmt: skip


def certificate(directory: Path, name: str, *addresses: str) -> None:
    """NAME.crt and NAME.key in `directory`, where the authority is: of a node that goes by this
    name and these IP addresses."""
    names = [f"DNS:{name}", *(f"IP:{address}" for address in addresses)]
    (directory / f"{name}.ext").write_text(f"subjectAltName={','.join(names)}\n")
    _openssl(
        directory, "req", *_NEW, "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )  # fmt: skip
    _openssl(
        directory, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
        "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext", "-out", f"{name}.crt",
    )  # fmt: skip


def _openssl(directory: Path, *words: str) -> None:
    done = subprocess.run(
        ["openssl", *words], cwd=directory, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
