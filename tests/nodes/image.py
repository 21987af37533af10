"""Container images made here, with no registry: busybox and whatever a test puts beside it.

An image is one OCI archive in the cache, named after its content. Nothing here runs a
container or knows a node beyond the root that busybox is taken from.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from dataclasses import dataclass
from functools import cache as remember
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.nodes import cache, roots

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]


@dataclass(frozen=True)
class Symlink:
    """A symbolic link in an image."""

    target: str


File = Path | bytes | Symlink


def reference(name: str, tag: str) -> str:
    """The name containerd knows the image by: `docker.io/local/busybox:1`."""
    return f"docker.io/{name}:{tag}"


def build_image(
    name: str,
    tag: str,
    files: Mapping[str, File],
    *,
    command: Sequence[str] = ("/bin/sh",),
    env: Mapping[str, str] | None = None,
) -> Path:
    """Builds `reference(name, tag)` and returns the archive.

    Every image has busybox with all its applets in /bin, and /tmp. `files` maps paths in the
    image to a file or a whole directory of the host (modes kept), the content of an
    executable file, or a `Symlink`.
    """
    layer = _layer({**_busybox(), **files})
    config = {
        "architecture": ARCHITECTURE,
        "os": "linux",
        "config": {
            "Cmd": list(command),
            "Env": [f"{k}={v}" for k, v in {"PATH": "/usr/bin:/bin", **(env or {})}.items()],
        },
        "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
    }
    blobs = [layer, _json(config)]
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _descriptor(blobs[1], "application/vnd.oci.image.config.v1+json"),
        "layers": [_descriptor(layer, "application/vnd.oci.image.layer.v1.tar")],
    }
    blobs.append(_json(manifest))
    top = _descriptor(blobs[2], manifest["mediaType"])
    top["annotations"] = {
        "io.containerd.image.name": reference(name, tag),
        "org.opencontainers.image.ref.name": tag,
    }
    archive = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json({"schemaVersion": 2, "manifests": [top]}),
        **{f"blobs/sha256/{_digest(blob).removeprefix('sha256:')}": blob for blob in blobs},
    }
    path = cache.directory() / "images" / f"{cache.digest(archive['index.json'])}.tar"
    with cache.locked(path):
        if not path.exists():
            draft = path.with_suffix(".draft")
            draft.write_bytes(_tar({n: (c, 0o644) for n, c in archive.items()}))
            draft.rename(path)
    return path


@remember
def _busybox() -> dict[str, File]:
    binary = roots.root("13") / "usr/bin/busybox"
    applets = subprocess.run([binary, "--list"], capture_output=True, text=True, check=True)
    links = {f"/bin/{name}": Symlink("/bin/busybox") for name in applets.stdout.split()}
    return {**links, "/bin/busybox": binary}


def _layer(files: Mapping[str, File]) -> bytes:
    """The files as a tar: sorted, owned by root, without times, so that it is always the
    same archive."""
    flat: dict[str, tuple[bytes | Symlink, int]] = {}
    for path, content in files.items():
        if isinstance(content, Path) and content.is_dir():
            for directory, _, names in os.walk(content):
                for name in names:
                    source = Path(directory, name)
                    inner = f"{path}/{source.relative_to(content)}"
                    flat[inner] = _read(source)
        else:
            flat[path] = _read(content) if isinstance(content, Path) else (content, 0o755)
    return _tar({path.lstrip("/"): entry for path, entry in flat.items()}, tmp=True)


def _read(source: Path) -> tuple[bytes | Symlink, int]:
    if source.is_symlink():
        return Symlink(os.readlink(source)), 0o777
    return source.read_bytes(), source.stat().st_mode & 0o7777


def _tar(files: Mapping[str, tuple[bytes | Symlink, int]], *, tmp: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        directories = {str(p): 0o755 for path in files for p in Path(path).parents}
        directories.pop(".", None)
        if tmp:
            directories["tmp"] = 0o1777
        for path in sorted(directories):
            info = tarfile.TarInfo(path)
            info.type, info.mode = tarfile.DIRTYPE, directories[path]
            tar.addfile(info)
        for path, (content, mode) in sorted(files.items()):
            info = tarfile.TarInfo(path)
            info.mode = mode
            if isinstance(content, Symlink):
                info.type, info.linkname = tarfile.SYMTYPE, content.target
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _descriptor(blob: bytes, media_type: Any) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}
