"""A checkpoint in containerd's content store: its files, its manifest, and where in its page files
a region of a process's memory lies. Reads only; knows CRIU's image format no further than that."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from typing import TYPE_CHECKING, Any, NamedTuple

from shim.protowire import Message, optional, uint32, uint64

if TYPE_CHECKING:
    from pathlib import Path

    from tests.nodes.node import Node

BLOBS = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256"
CRIU_TAR = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
PAGE = 4096
_MAGICS = struct.pack("<II", 0x54564319, 0x56084025)  # IMG_COMMON, PAGEMAP (criu/include/magic.h)
_PRESENT = 4  # the page is in the page file (criu/include/pagemap.h)


class _Head(Message):
    """First record of pagemap-N.img: the number in the page file's name."""

    pages_id: int | None = optional(uint32(1))


class _Run(Message):
    """A run of pages, in the order in which they stand in the page file."""

    vaddr: int | None = optional(uint64(1))
    nr_pages: int | None = optional(uint32(2))
    flags: int | None = optional(uint32(4))


class Place(NamedTuple):
    """Part of a file."""

    name: str
    offset: int
    size: int


class Images:
    """The image directory that containerd stored as a tar, open for reading."""

    def __init__(self, node: Node, reference: str) -> None:
        lines = (line.split() for line in node.ctr("images", "ls").stdout.splitlines()[1:])
        digest = next(words[2] for words in lines if words[0] == reference)
        index = json.loads(_blob(node, digest).read_text())
        tar = next(one["digest"] for one in index["manifests"] if one["mediaType"] == CRIU_TAR)
        self._tar = tarfile.TarFile(_blob(node, tar))
        self._members = {
            entry.name.removeprefix("./"): entry for entry in self._tar if entry.isfile()
        }

    def sizes(self) -> dict[str, int]:
        return {name: member.size for name, member in self._members.items()}

    def manifest(self) -> Any:
        return json.loads(self._read("grit.json"))

    def region(self, pid: int, start: int, end: int) -> Place:
        """Where the pages [start, end) of process `pid` (as the container sees it) lie, in one
        piece. Raises LookupError if they are not there."""
        records = _records(self._read(f"pagemap-{pid}.img"))
        name = f"pages-{_Head.decode(records[0]).pages_id}.img"
        offset, found = 0, 0
        first = -1
        for run in map(_Run.decode, records[1:]):
            vaddr, size = run.vaddr or 0, (run.nr_pages or 0) * PAGE
            if not (run.flags or 0) & _PRESENT:
                continue
            inside = min(vaddr + size, end) - max(vaddr, start)
            if inside > 0:
                if first < 0:
                    first = offset + max(start - vaddr, 0)
                found += inside
            offset += size
        if first < 0:
            raise LookupError(f"{name} holds nothing of {start:#x}-{end:#x} of process {pid}")
        return Place(name, first, found)

    def bytes_at(self, place: Place) -> bytes:
        file = self._tar.extractfile(self._members[place.name])
        assert file
        file.seek(place.offset)
        return file.read(place.size)

    def _read(self, name: str) -> bytes:
        return self.bytes_at(Place(name, 0, self._members[name].size))


def _blob(node: Node, digest: str) -> Path:
    return node.path(f"{BLOBS}/{digest.removeprefix('sha256:')}")


def _records(data: bytes) -> list[bytes]:
    """The records of an image file: a 32-bit length, then a protobuf."""
    stream = io.BytesIO(data)
    if stream.read(8) != _MAGICS:
        raise ValueError("not a pagemap image")
    records = []
    while head := stream.read(4):
        records.append(stream.read(struct.unpack("<I", head)[0]))
    return records
