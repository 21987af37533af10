"""Checkpoint archives as podman, CRI-O and containerd's CRI write them: one tar file, which grit
does not restore from. Read once to its end, so that whatever is damaged is met.
"""

from __future__ import annotations

import json
import os
import tarfile

from shim import checkpoint_dir, oci_layer
from shim.gritctl.stored import NotACheckpoint, text, writer_of
from shim.manifest import INVENTORY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

_MAX_DOCUMENT = 16 << 20
_MAX_NAMES = 64 << 20  # bytes of all names together, each counted as 64 more
_MAX_WRONG = 10  # entries named; the first is enough not to unpack it
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Archive:
    """`problem` says what is wrong with the tar itself, "" if it could be read to its end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.names: list[str] = []
        self.documents: dict[str, dict[str, Any]] = {}
        self.bytes = os.path.getsize(path)
        self.unpacked = 0
        self.problem = ""
        self.wrong: list[str] = []

    @property
    def writer(self) -> str:
        return writer_of(self.documents.get(checkpoint_dir.SPEC_DUMP, {}), self.names)

    @property
    def container(self) -> str:
        return text(self.documents.get(checkpoint_dir.CONFIG_DUMP, {}).get("id")) or "?"

    @property
    def image(self) -> str:
        return text(self.documents.get(checkpoint_dir.CONFIG_DUMP, {}).get("rootfsImageName"))

    def advice(self) -> str:
        return (
            f"grit restores directories, not archives: mkdir DIR && tar -xf {self.path} -C DIR, "
            "then gritctl show DIR"
        )


def read(path: str) -> Archive:
    """Raises NotACheckpoint where the file is no tar archive or has no CRIU images in it."""
    found = Archive(path)
    try:
        with open(path, "rb") as file:
            _read(decompressed(file), found)
    except (tarfile.ReadError, oci_layer.LayerError, EOFError, OSError, ValueError) as error:
        if not found.names:
            raise NotACheckpoint(
                f"{path} is neither a checkpoint directory nor a tar archive of one: {error}"
            ) from error
        found.problem = f"cut short or damaged after {found.names[-1]}: {error}"
    except Exception as error:  # zlib's, lzma's and zstd's own
        if not found.names:
            raise NotACheckpoint(f"{path} cannot be read as an archive: {error}") from error
        found.problem = f"damaged after {found.names[-1]}: {error}"
    if not found.problem and not any(n.endswith(f"/{INVENTORY}") for n in found.names):
        if checkpoint_dir.CONFIG_DUMP in found.names or checkpoint_dir.IMAGES in found.names:
            found.wrong.append(f"has no {checkpoint_dir.IMAGES}/{INVENTORY}: not a whole dump")
        else:
            raise NotACheckpoint(f"{path} is an archive, but holds no checkpoint")
    return found


def decompressed(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic != _ZSTD_MAGIC:
        return file
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return zstd.open(file)  # type: ignore[no-any-return, unused-ignore]
    except ImportError:
        import zstandard

        stream: IO[bytes] = zstandard.ZstdDecompressor().stream_reader(file)
        return stream


def _read(file: IO[bytes], found: Archive) -> None:
    room = _MAX_NAMES
    with tarfile.open(fileobj=file, mode="r|*", tarinfo=oci_layer.Entry) as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # it would remember them all
            name = os.path.normpath(member.name)
            room -= len(name) + 64
            if room < 0:
                raise ValueError(f"it has more than {len(found.names)} entries, as none has")
            found.names.append(name)
            odd = _odd(member)
            if odd and len(found.wrong) < _MAX_WRONG:
                found.wrong.append(f"{name} {odd}: do not unpack it")
            if not member.isfile():
                continue
            data = tar.extractfile(member)
            assert data is not None
            kept = b""
            size = 0
            while block := data.read(1 << 20):
                size += len(block)
                if name in (checkpoint_dir.CONFIG_DUMP, checkpoint_dir.SPEC_DUMP):
                    kept += block[: _MAX_DOCUMENT - len(kept)]
            found.unpacked += size
            if size != member.size:
                raise EOFError(f"{name} has {size} bytes of {member.size}")
            if name in (checkpoint_dir.CONFIG_DUMP, checkpoint_dir.SPEC_DUMP):
                _keep_document(found, name, kept)


def _odd(member: tarfile.TarInfo) -> str:
    """What no checkpoint holds, and whoever unpacks it would write or open elsewhere."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return "leads out of the directory it is unpacked into"
    if not (member.isreg() or member.isdir()):
        return "is a link or a device, which no checkpoint holds"
    return ""


def _keep_document(found: Archive, name: str, data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        found.wrong.append(f"{name} is not valid JSON: {error}")
        return
    if isinstance(document, dict):
        found.documents[name] = document
    else:
        found.wrong.append(f"{name} is not a JSON object")
