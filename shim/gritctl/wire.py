"""What `gritctl migrate` and `gritctl receive` say to each other: messages on a connection.

A message is two lengths, a JSON object of the first, and bytes of the second. `op` says what it is:

    hello    said by who listens, once it knows who calls
    begin    control, first: id, name, image, snapshotter, parent, room, checksum,
             key (the identity of what encrypts, "" for none)             -> ready
    join     a stream, first: id                                          -> ready
    chunk    a stream: file, offset, and the bytes
    hole     a stream: file, offset, length: zeros
    sync     a stream: all before it shall be written                     -> synced
    commit   control: files, with their sizes                             -> stored, then runs: pid
    keep     control: yours shall live, ours ends                         -> kept
    failed   an answer in any place: error

Who listens believes none of it before it has looked: see `arrival`.
"""

from __future__ import annotations

import json
import select
import socket
import ssl
import struct
import time

from shim.checkpoint_dir import MAX_MANIFEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

VERSION = 2
CHUNK = 8 << 20
"""Bytes that a message carries at most. Chunks begin at its multiples."""

_LENGTHS = struct.Struct("!II")
_LOOK_SECONDS = 0.2


class WireError(Exception):
    """The connection is of no more use; says why."""


class PeerFailed(WireError):
    """The peer says so itself, and why."""


class Connection:
    """One end. Of one thread, but for `cut`."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def send(self, op: str, data: memoryview | bytes = b"", **facts: object) -> None:
        """Raises WireError."""
        text = json.dumps({"op": op, **facts}).encode()
        try:
            self._socket.sendall(_LENGTHS.pack(len(text), len(data)) + text)
            if len(data):
                self._socket.sendall(data)
        except (OSError, ValueError) as error:
            raise WireError(_reason(error)) from error

    def receive(
        self, buffer: memoryview | None = None, idle: Callable[[], None] | None = None
    ) -> tuple[dict[str, Any], int]:
        """The next message, and how many bytes of `buffer` it has filled. While there is none,
        `idle` is called now and then; it may raise. Raises WireError."""
        room = len(buffer) if buffer is not None else 0
        self._socket.settimeout(_LOOK_SECONDS if idle else None)
        text_size, size = _LENGTHS.unpack(self._exactly(_LENGTHS.size, idle))
        if text_size > MAX_MANIFEST or size > room:
            raise WireError(f"the peer announced a message of {text_size} and {size} bytes")
        try:
            facts = json.loads(self._exactly(text_size, idle))
        except (ValueError, RecursionError) as error:
            raise WireError(f"the peer sent what is not JSON: {error}") from error
        if not isinstance(facts, dict):
            raise WireError("the peer sent no JSON object")
        if buffer is not None:
            self._fill(buffer[:size], idle)
        self._socket.settimeout(None)
        return facts, size

    def expect(self, op: str, idle: Callable[[], None] | None = None) -> dict[str, Any]:
        """The next message, which must be `op`. Raises WireError; PeerFailed with what the peer
        says has failed."""
        facts, _ = self.receive(idle=idle)
        if facts.get("op") == "failed":
            raise PeerFailed(str(facts.get("error")))
        if facts.get("op") != op:
            raise WireError(f"the peer said {facts.get('op')!r} where {op!r} was due")
        return facts

    def has_news(self) -> bool:
        """Whether the peer has said something or is gone."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def cut(self) -> None:
        """Ends it, whatever another thread waits for there."""
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS's own would race
        except OSError:
            pass

    def close(self) -> None:
        self._socket.close()

    def _exactly(self, size: int, idle: Callable[[], None] | None) -> bytes:
        data = bytearray(size)
        self._fill(memoryview(data), idle)
        return bytes(data)

    def _fill(self, buffer: memoryview, idle: Callable[[], None] | None) -> None:
        while len(buffer):
            try:
                count = self._socket.recv_into(buffer)
            except TimeoutError:
                if idle:
                    idle()
                continue
            except (OSError, ValueError) as error:
                raise WireError(_reason(error)) from error
            if not count:
                raise WireError("the connection was cut")
            buffer = buffer[count:]


def within(seconds: float, also: Callable[[], None] | None = None) -> Callable[[], None]:
    """An `idle` that raises WireError once these are over; it calls `also`."""
    deadline = time.monotonic() + seconds

    def idle() -> None:
        if time.monotonic() > deadline:
            raise WireError(f"the peer has not answered in time ({seconds:.0f} s)")
        if also:
            also()

    return idle


def text(facts: dict[str, Any], key: str) -> str:
    """Raises WireError."""
    value = facts.get(key)
    if not isinstance(value, str):
        raise WireError(f"the peer said no {key}")
    return value


def number(facts: dict[str, Any], key: str) -> int:
    """0 or above. Raises WireError."""
    value = facts.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise WireError(f"the peer said no {key}")
    return value


def tune(sock: socket.socket) -> None:
    """A peer that is gone without a word is noticed within half a minute."""
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
    ):
        sock.setsockopt(level, option, value)


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionError | ssl.SSLEOFError):
        return "the connection was cut"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
