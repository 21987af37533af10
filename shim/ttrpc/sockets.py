"""Unix sockets: connecting to an address as containerd writes it, accepting, and who is at the
other end. `_socket` is all of it: its front, `socket`, brings `enum` and `selectors`, which is 7 ms
of a process's start and a MiB."""

from __future__ import annotations

import _socket
import os
import struct

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred of unix(7)
_TIMEVAL = struct.Struct("ll")


def connect(address: str, timeout: float = 5.0) -> _socket.socket:
    """A blocking socket connected to `unix:///path`, `unix://@abstract` or `/path`.

    Waits at most `timeout` seconds for a listener whose backlog is full. Raises OSError, naming the
    address.
    """
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        # Not settimeout(): a non-blocking connect to a full backlog fails instead of waiting.
        seconds, fraction = divmod(timeout, 1)
        value = _TIMEVAL.pack(int(seconds), int(fraction * 1e6))
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, value)
        sock.connect(socket_path(address))
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
    except OSError as error:
        sock.close()
        raise type(error)(error.errno, f"cannot connect to {address}: {error.strerror}") from None
    return sock


def accept(listener: _socket.socket) -> _socket.socket:
    """The next connection, as socket.socket.accept. Raises OSError."""
    fd, _ = listener._accept()  # type: ignore[attr-defined]
    return _socket.socket(fileno=fd)


def socket_path(address: str) -> str:
    """The address as bind() and connect() take it. Raises ValueError for any other kind."""
    path = address.removeprefix("unix://")
    if path.startswith("@"):
        return "\0" + path[1:]
    if not path.startswith("/"):
        raise ValueError(f"{address!r} is not the address of a unix socket")
    return path


def is_same_user(sock: _socket.socket) -> bool:
    """Whether the peer had our user and group when it connected, as Go's same-user handshake."""
    raw = sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, gid = _CREDENTIALS.unpack(raw)
    return (uid, gid) == (os.geteuid(), os.getegid())


def hang_up(sock: _socket.socket) -> None:
    """Ends both directions, which wakes whoever is blocked on the socket; close() would not."""
    try:
        sock.shutdown(_socket.SHUT_RDWR)
    except OSError:  # the peer was quicker, or it has happened before
        return
