"""A look into CRIU's images without CRIU: which plugins made them, which processes are in them,
how many bytes of pages, what the dump's statistics say.

An image file is a magic number or two (32 bits, little endian), then records of a 32-bit length
and a protobuf (criu/image.c, criu/protobuf.c; the magics are in criu/include/magic.h). The
parsing takes bytes; only the functions that take a directory touch the disk, and they only read.
"""

from __future__ import annotations

import os

from shim.protowire import (
    DecodeError,
    Message,
    bool_,
    message,
    optional,
    repeated,
    string,
    uint32,
    uint64,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    M = TypeVar("M", bound=Message)
    T = TypeVar("T")

_COMMON_MAGIC = 0x54564319
_SERVICE_MAGIC = 0x55105940
_INVENTORY_MAGIC = 0x58313116
_PSTREE_MAGIC = 0x50273030
_STATS_MAGIC = 0x57093306
PAGEMAP_MAGIC = 0x56084025

PAGE = 4096
_PRESENT = 4  # criu/include/pagemap.h: PE_PRESENT, the pages are in this image and no other

CUDA_PLUGIN = "cuda_plugin"


class ImageError(Exception):
    """A directory or file is not a whole CRIU image."""


class Plugins(Message):
    names: list[str] = repeated(string(12))


class Inventory(Message):
    """`plugins` is None in images from before CRIU 4.1, which kept no list."""

    img_version: int | None = optional(uint32(1))
    plugins: Plugins | None = message(12, Plugins)


class Process(Message):
    """Pids are as the container sees them."""

    pid: int | None = optional(uint32(1))
    ppid: int | None = optional(uint32(2))
    pgid: int | None = optional(uint32(3))
    sid: int | None = optional(uint32(4))
    threads: list[int] = repeated(uint32(5))


class DumpStats(Message):
    """Times in microseconds, pages of 4 KiB (the machine's page size)."""

    freezing_time: int | None = optional(uint32(1))
    frozen_time: int | None = optional(uint32(2))
    memdump_time: int | None = optional(uint32(3))
    memwrite_time: int | None = optional(uint32(4))
    pages_scanned: int | None = optional(uint64(5))
    pages_written: int | None = optional(uint64(7))
    shpages_written: int | None = optional(uint64(14))


class PagemapHead(Message):
    pages_id: int | None = optional(uint32(1))


class PagemapEntry(Message):
    """`nr_pages` since CRIU 4.1, which writes the other one too where it is large enough."""

    vaddr: int | None = optional(uint64(1))
    nr_pages_32: int | None = optional(uint32(2))
    in_parent: bool | None = optional(bool_(3))
    flags: int | None = optional(uint32(4))
    nr_pages: int | None = optional(uint64(5))

    def size(self) -> int:
        """In bytes."""
        return (self.nr_pages or self.nr_pages_32 or 0) * PAGE


class _Stats(Message):
    dump: DumpStats | None = message(1, DumpStats)


class Sizes:
    """Bytes in an image directory: all files, the page files among them, and the biggest."""

    __slots__ = ("biggest", "biggest_bytes", "page_bytes", "total_bytes")

    def __init__(self, total_bytes: int, page_bytes: int, biggest: str, biggest_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.page_bytes = page_bytes
        self.biggest = biggest
        self.biggest_bytes = biggest_bytes


def parse_inventory(data: bytes) -> Inventory:
    """The content of inventory.img, the one image with a single magic. Raises ImageError."""
    records = _records(data, _INVENTORY_MAGIC)
    if len(records) != 1:
        raise ImageError(f"an inventory has one record, this has {len(records)}")
    return decode(Inventory, records[0])


def parse_pstree(data: bytes) -> list[Process]:
    """The content of pstree.img: parents before children. Raises ImageError."""
    return [decode(Process, record) for record in _records(data, _COMMON_MAGIC, _PSTREE_MAGIC)]


def parse_dump_stats(data: bytes) -> DumpStats:
    """The content of stats-dump, which CRIU writes into its work directory. Raises ImageError."""
    records = _records(data, _SERVICE_MAGIC, _STATS_MAGIC)
    stats = decode(_Stats, records[0]).dump if records else None
    if stats is None:
        raise ImageError("no statistics of a dump in it")
    return stats


def parse_pagemap(data: bytes, ranges: list[tuple[int, int]]) -> tuple[str, int]:
    """The content of pagemap-<pid>.img: which file has the process's pages, and how many bytes of
    the address ranges [start, end) are in it. Raises ImageError."""
    from bisect import bisect_right

    records = _records(data, _COMMON_MAGIC, PAGEMAP_MAGIC)
    if not records:
        raise ImageError("a pagemap without a head")
    head = decode(PagemapHead, records[0])
    low = min((start for start, _ in ranges), default=0)
    high = max((end for _, end in ranges), default=0)
    total = 0
    # In ascending order. There may be tens of thousands, and the process stands still meanwhile.
    first = bisect_right(records, low, lo=1, key=_first_varint) - 1
    for record in records[max(first, 1) :]:
        if _first_varint(record) >= high:
            break
        entry = decode(PagemapEntry, record)
        start = entry.vaddr or 0
        end = start + entry.size()
        if (entry.flags or 0) & _PRESENT:
            total += sum(max(min(end, e) - max(start, s), 0) for s, e in ranges)
    return f"pages-{head.pages_id}.img", total


def pages_within(images_dir: str, pid: int, ranges: list[tuple[int, int]]) -> tuple[str, int]:
    """What `parse_pagemap` says of the process that has this pid inside the container."""
    return parse_pagemap(_read(images_dir, f"pagemap-{pid}.img"), ranges)


def inventory(images_dir: str) -> Inventory:
    """Raises ImageError where the directory holds no CRIU images."""
    return _named(images_dir, "inventory.img", parse_inventory)


def plugins(images_dir: str) -> list[str] | None:
    """The CRIU plugins a restore needs (CUDA_PLUGIN is one); None where the images do not say,
    as before CRIU 4.1."""
    listed = inventory(images_dir).plugins
    return None if listed is None else listed.names


def processes(images_dir: str) -> list[Process]:
    return _named(images_dir, "pstree.img", parse_pstree)


def dump_stats(work_dir: str) -> DumpStats:
    return parse_dump_stats(_read(work_dir, "stats-dump"))


def sizes(images_dir: str) -> Sizes:
    """Raises ImageError where the directory cannot be listed or is empty."""
    try:
        with os.scandir(images_dir) as entries:
            files = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as err:
        raise ImageError(f"{images_dir}: {err.strerror}") from err
    if not files:
        raise ImageError(f"{images_dir}: no files in it")
    biggest = max(files, key=files.__getitem__)
    return Sizes(
        total_bytes=sum(files.values()),
        page_bytes=sum(
            size
            for name, size in files.items()
            if name.startswith("pages-") and name.endswith(".img")
        ),
        biggest=biggest,
        biggest_bytes=files[biggest],
    )


def read_records(images_dir: str, name: str, magic: int) -> list[bytes]:
    """The records of the image `name`, whose own magic is `magic`. Raises ImageError naming it."""
    return _named(images_dir, name, lambda data: _records(data, _COMMON_MAGIC, magic))


def read(images_dir: str, name: str, kind: type[M], magic: int) -> list[M]:
    """The same, each record decoded."""
    return _named(
        images_dir,
        name,
        lambda data: [decode(kind, record) for record in _records(data, _COMMON_MAGIC, magic)],
    )


def _named(directory: str, name: str, parse: Callable[[bytes], T]) -> T:
    """Errors are about a file: they say which."""
    data = _read(directory, name)
    try:
        return parse(data)
    except ImageError as err:
        raise ImageError(f"{os.path.join(directory, name)}: {err}") from err


def _records(data: bytes, *magics: int) -> list[bytes]:
    position = 0
    for magic in magics:
        found, position = _u32(data, position)
        if found != magic:
            raise ImageError(f"magic {found:#x}, expected {magic:#x}")
    records = []
    while position < len(data):
        length, position = _u32(data, position)
        if position + length > len(data):
            raise ImageError("cut short within a record")
        records.append(data[position : position + length])
        position += length
    return records


def _first_varint(record: bytes) -> int:
    """The value of a record's first field, of which every record here is known to be a number."""
    value = 0
    for shift, byte in enumerate(record[1:11]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            break
    return value


def _u32(data: bytes, position: int) -> tuple[int, int]:
    end = position + 4
    if end > len(data):
        raise ImageError("cut short within a number")
    return int.from_bytes(data[position:end], "little"), end


def decode(kind: type[M], data: bytes) -> M:
    """One record as a message. Raises ImageError."""
    try:
        return kind.decode(data)
    except DecodeError as err:
        raise ImageError(f"not a record of its kind: {err}") from err


def _read(directory: str, name: str) -> bytes:
    try:
        with open(os.path.join(directory, name), "rb") as file:
            return file.read()
    except OSError as err:
        raise ImageError(f"{directory}: no readable {name}: {err.strerror}") from err
