"""The form of a lane's file that is compressed.

    file     chunks, the index; each is followed by zeros up to a multiple of 4096 bytes
    chunk    4 MiB of memory, the last one fewer, compressed by itself: one block of LZ4, one frame
             of Zstandard. As it was where compressing saves less than 4096 bytes; nothing at all
             where it is zeros
    index    MAGIC, the codec's name in 4 bytes, the size of the memory in 8, and of each chunk how
             many bytes it has in the file, in 4: 0 of zeros, its own size of what is as it was;
             numbers have their lowest byte first

How many chunks there are follows from the size of the memory, which the manifest has, and so does
the index's size; where a chunk lies, from those before it. So the sizes of a file have to agree
before anything of it is used, and all that is written for it, `direct` or not, is whole pages.
"""

from __future__ import annotations

import mmap
import os
import struct

from shim import offsets
from shim.cuda import codec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 4 << 20
_PAGE = 4096
_HEAD = struct.Struct("<12s4sQ")
MAGIC = b"grit-packed1"
_MOST = 1 << 20
"""Chunks. More than 4 TiB are in no file: the index is read at once."""


class Damaged(Exception):
    """A file is not what was written; says what is wrong."""


class Packing:
    """A file of memory as it is made, from its first chunk to its last, by one thread. The buffer,
    given by its address and as a view, has a chunk's size, and begins at a page."""

    def __init__(self, name: str, address: int, buffer: memoryview) -> None:
        """Raises codec.Unavailable."""
        self._name, self._address, self._buffer = name, address, buffer
        self._compress = codec.compressor(name)
        self._sizes: list[int] = []
        self._memory = self._end = 0

    def add(self, address: int, chunk: memoryview, empty: bool) -> tuple[memoryview, int]:
        """What the file has of the next chunk of memory, of whole pages, and where; it is good
        until the next one. Nothing of one that is `empty`."""
        size, stored = 0, chunk[:0]
        if not empty:
            size = self._compress(address, len(chunk), self._address, len(chunk) - _PAGE)
            stored = self._buffer[: padded(size)] if size else chunk
            if size:
                stored[size:] = bytes(len(stored) - size)
        self._sizes.append(size or len(stored))
        self._memory += len(chunk)
        return self._placed(stored)

    def index(self) -> tuple[memoryview, int]:
        """What the file ends with, and where."""
        made = mmap.mmap(-1, _index_size(len(self._sizes)))  # begins at a page
        made.write(_HEAD.pack(MAGIC, self._name.encode(), self._memory))
        made.write(struct.pack(f"<{len(self._sizes)}I", *self._sizes))
        return self._placed(memoryview(made))

    def _placed(self, stored: memoryview) -> tuple[memoryview, int]:
        at = self._end
        self._end += len(stored)
        return stored, at


def read_index(name: str, fd: int, size: int) -> tuple[list[int], memoryview]:
    """How many bytes each chunk has in a file of that codec and so many bytes of memory, and the
    index as it lies at the file's end. Raises Damaged where any of it cannot be, OSError."""
    count = -(-size // CHUNK)
    if count > _MOST:
        raise Damaged(f"{size} bytes of memory are more than is ever in one file")
    index = memoryview(bytearray(_index_size(count)))
    end = os.fstat(fd).st_size - len(index)
    if end < 0 or offsets.read(fd, index, end) < len(index):
        raise Damaged("it is shorter than its index")
    magic, codec_name, memory = _HEAD.unpack_from(index)
    if magic != MAGIC or codec_name.rstrip(b"\0") != name.encode():
        raise Damaged(f"it has no index of {name}'s chunks at its end")
    if memory != size:
        raise Damaged(f"by its index it is of {memory} bytes of memory, not {size}")
    sizes = list(struct.unpack_from(f"<{count}I", index, _HEAD.size))
    if any(stored > here for stored, here in zip(sizes, chunk_sizes(size), strict=True)):
        raise Damaged("by its index a chunk has more bytes than it had in memory")
    if sum(map(padded, sizes)) != end:
        raise Damaged(f"by its index its chunks have {sum(map(padded, sizes))} bytes, not {end}")
    return sizes, index


def chunk_sizes(size: int) -> Iterator[int]:
    """Of memory of that size, in bytes."""
    return (min(CHUNK, size - at) for at in range(0, size, CHUNK))


def padded(size: int) -> int:
    """To whole pages."""
    return -(-size // _PAGE) * _PAGE


def _index_size(count: int) -> int:
    return padded(_HEAD.size + 4 * count)
