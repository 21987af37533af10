"""Bytes to frames and back: the ten-byte header and the limit of 4 MiB.

A frame is `length u32 | stream id u32 | kind u8 | flags u8 | data`, big endian, the length counting
the data alone (containerd/ttrpc: channel.go). Nothing here may do I/O or judge what a frame means.
"""

from __future__ import annotations

from struct import Struct

from shim.ttrpc.status import RESOURCE_EXHAUSTED, StatusError

HEADER = Struct(">IIBB")
HEADER_LENGTH = HEADER.size
MAX_DATA = 4 << 20
"""Most bytes of data a frame may carry, on either side."""

# Kinds of frames.
REQUEST, RESPONSE, DATA = 1, 2, 3

# Flags: of requests and data the first, of requests the second, of data the third.
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4


class Frame:
    """A whole frame as it came: `raw` is header and data together, so it can be passed on."""

    __slots__ = ("flags", "kind", "raw", "stream_id")

    def __init__(self, stream_id: int, kind: int, flags: int, raw: bytes) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.raw = raw

    @property
    def data(self) -> bytes:
        return self.raw[HEADER_LENGTH:]

    @property
    def ends_stream(self) -> bool:
        """Whether a server that sends this says nothing more on the stream."""
        return self.kind == RESPONSE or (self.kind == DATA and self.flags & REMOTE_CLOSED != 0)


class Oversize:
    """A frame with more than MAX_DATA bytes, reported once all of it was read and thrown away."""

    __slots__ = ("kind", "length", "stream_id")

    def __init__(self, stream_id: int, kind: int, length: int) -> None:
        self.stream_id = stream_id
        self.kind = kind
        self.length = length

    @property
    def error(self) -> StatusError:
        return too_long(self.length)


def too_long(length: int) -> StatusError:
    """What `length` bytes of data in one frame are answered with."""
    return StatusError(
        RESOURCE_EXHAUSTED,
        f"message length {length} exceeds the maximum message size of {MAX_DATA}",
    )


def frame(stream_id: int, kind: int, flags: int = 0, data: bytes = b"") -> bytes:
    """One frame for the wire. Raises StatusError (RESOURCE_EXHAUSTED) above MAX_DATA bytes."""
    if len(data) > MAX_DATA:
        raise too_long(len(data))
    return HEADER.pack(len(data), stream_id, kind, flags) + data


class FrameReader:
    """Cuts a stream of bytes, in whatever pieces it arrives, into frames. No bytes are an error."""

    __slots__ = ("_buffer", "_discarding", "_needed", "_oversize")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._needed = HEADER_LENGTH  # bytes the buffer must hold before looking again pays
        self._discarding = 0
        self._oversize: Oversize | None = None

    @property
    def in_frame(self) -> bool:
        """Whether the bytes so far end in the middle of a frame."""
        return bool(self._buffer) or self._oversize is not None

    def feed(self, data: bytes) -> list[Frame | Oversize]:
        """The frames that `data` completes."""
        found: list[Frame | Oversize] = []
        pos = 0
        if self._oversize is not None:
            pos = min(self._discarding, len(data))
            self._discarding -= pos
            if self._discarding:
                return found
            found.append(self._oversize)
            self._oversize = None
        elif self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return found
            data = bytes(self._buffer)
            self._buffer = bytearray()
        end = len(data)
        self._needed = HEADER_LENGTH
        while end - pos >= HEADER_LENGTH:
            length, stream_id, kind, flags = HEADER.unpack_from(data, pos)
            stop = pos + HEADER_LENGTH + length
            if length > MAX_DATA:
                oversize = Oversize(stream_id, kind, length)
                if stop > end:
                    self._oversize = oversize
                    self._discarding = stop - end
                    return found
                found.append(oversize)
            elif stop > end:
                self._needed = stop - pos
                break
            else:
                raw = data if stop - pos == end else data[pos:stop]
                found.append(Frame(stream_id, kind, flags, raw))
            pos = stop
        if pos < end:
            self._buffer += data[pos:] if pos else data
        return found
