"""Parts that the ttrpc tests stand on: listeners, servers and proxies on threads, raw peers."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shim import ttrpc
from shim.ttrpc.connection import ClientConnection, ClientEvent
from shim.ttrpc.frames import Frame, FrameReader, Oversize

TIMEOUT = 20.0
"""Seconds after which a test that waits has failed; nothing is expected to take them."""


def listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def dial(path: Path) -> socket.socket:
    sock = ttrpc.connect(str(path))
    sock.settimeout(TIMEOUT)
    return sock


@contextlib.contextmanager
def running(what: ttrpc.Server | ttrpc.Proxy) -> Iterator[threading.Thread]:
    """Runs a server or a proxy on a thread, and sees it end at the end of the block."""
    thread = threading.Thread(target=what.run)
    thread.start()
    try:
        yield thread
        assert thread.is_alive(), "it ended by itself"
    finally:
        what.stop()
        thread.join(TIMEOUT)
        assert not thread.is_alive(), "it did not end when told to"


@contextlib.contextmanager
def serving(path: Path, handlers: Mapping[str, Mapping[str, Any]]) -> Iterator[ttrpc.Server]:
    server = ttrpc.Server(listen(path), handlers)
    with running(server):
        yield server


@contextlib.contextmanager
def proxying(
    outer: Path,
    inner: Path,
    handlers: Mapping[str, Callable[[ttrpc.Call], Any]] | None = None,
    on_close: Callable[[int], None] | None = None,
) -> Iterator[ttrpc.Proxy]:
    """A proxy that answers the given methods itself, whatever their service."""

    def handler_for(service: str, method: str) -> Any:
        return (handlers or {}).get(method)

    proxy = ttrpc.Proxy(listen(outer), lambda: ttrpc.connect(str(inner)), handler_for, on_close)
    with running(proxy):
        yield proxy


class RawPeer:
    """The client's end of a connection without a client: sends any bytes, reads frames."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(TIMEOUT)
        self.core = ClientConnection()
        self._reader = FrameReader()
        self._frames: list[Frame | Oversize] = []
        self._events: list[ClientEvent] = []

    def request(self, method: str, payload: bytes = b"", flags: int = 0) -> int:
        stream_id, raw = self.core.request("svc", method, payload, flags=flags)
        self.sock.sendall(raw)
        return stream_id

    def frame(self) -> Frame:
        """The next frame; EOFError at the connection's end."""
        while not self._frames:
            self._frames = self._reader.feed(self._recv())
        item = self._frames.pop(0)
        assert isinstance(item, Frame)
        return item

    def event(self) -> ClientEvent:
        """The next event of a stream that `request` began."""
        while not self._events:
            self._events = self.core.receive(self._recv())
        return self._events.pop(0)

    def at_end(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def _recv(self) -> bytes:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError
        return data

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()


def until(what: Callable[[], bool]) -> None:
    """Waits for something that no event announces."""
    deadline = time.monotonic() + TIMEOUT
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def as_nobody(action: Callable[[], None]) -> None:
    """Runs the action in a child that is another user; fails if it raises there."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
