"""What a node needs to download as this host does: its apt, pip and certificate settings.

They are shown to a node with `network="host"` while it runs and never written anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
_FOR_PIP = ("PIP_", "REQUESTS_CA", "SSL_CERT_FILE")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy")


def environment() -> dict[str, str]:
    """The host's proxies, and how its pip is set up by variables."""
    return {
        "PIP_NO_CACHE_DIR": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
        **{
            name: value
            for name, value in os.environ.items()
            if name.startswith(_FOR_PIP) or name.lower() in _PROXIES
        },
    }


def binds() -> dict[str, Path]:
    """Files and directories of the host, by where the node must see them."""
    places = {
        "/etc/pip.conf": Path("/etc/pip.conf"),
        "/root/.config/pip": Path("~/.config/pip").expanduser(),
        "/etc/apt/auth.conf.d": Path("/etc/apt/auth.conf.d"),
        "/etc/ssl/certs/ca-certificates.crt": CERTIFICATES,
    }
    places |= {str(local): local for local in _local_indexes()}
    return {target: source for target, source in places.items() if source.exists()}


def _local_indexes() -> set[Path]:
    """Directories of this host that its pip is told to look into; the files of an index lie
    beside its pages."""
    words = " ".join(os.environ.get(n, "") for n in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"))
    for config in ("/etc/pip.conf", "~/.config/pip/pip.conf"):
        path = Path(config).expanduser()
        words += " " + (path.read_text() if path.exists() else "")
    found = (Path(word.removeprefix("file://")) for word in words.split())
    present = {path for path in found if path.is_absolute() and path.is_dir()}
    return {path.parent if path.name == "simple" else path for path in present}
