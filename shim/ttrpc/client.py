"""The client: one connection, used by any number of threads at once.

A thread of its own reads; callers write under a lock that also covers taking the stream id, because
ids must reach the wire in order. A call given up at its deadline leaves nothing behind but the late
answer, which is ignored. Nothing here retries or reconnects.
"""

from __future__ import annotations

import _socket
import select
import threading
from collections import deque
from time import monotonic

from shim.ttrpc.connection import ClientConnection
from shim.ttrpc.events import DataEnded, DataReceived
from shim.ttrpc.frames import REMOTE_CLOSED, REMOTE_OPEN
from shim.ttrpc.sockets import hang_up
from shim.ttrpc.status import DEADLINE_EXCEEDED, ConnectionClosed, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType
    from typing import Self

    from shim.ttrpc.connection import ClientEvent

_READ = 1 << 16


class Client:
    """Calls over a connected unix socket, which the client then owns."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self._protocol = ClientConnection()
        self._sending = threading.Lock()  # guards what goes to the wire, ids included
        self._state = threading.Lock()  # guards the protocol core and the two below
        self._streams: dict[int, Stream] = {}
        self._closed: str | None = None
        sock.settimeout(None)
        self._thread = threading.Thread(target=self._read, name="ttrpc client", daemon=True)
        self._thread.start()

    def call(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """The payload of the answer.

        `timeout` in seconds is told to the server and kept here. Raises StatusError for an answer
        that is not OK, with DEADLINE_EXCEEDED when none came in time, and ConnectionClosed.
        """
        stream = Stream(self, f"{service}/{method}", timeout)
        stream.start(service, method, payload, metadata, flags=0)
        return stream.response()

    def stream(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        sending: bool = False,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Stream:
        """Begins a streaming call; `sending` if this side sends messages too. Raises as `call`."""
        stream = Stream(self, f"{service}/{method}", timeout)
        flags = REMOTE_OPEN if sending else REMOTE_CLOSED
        stream.start(service, method, payload, metadata, flags)
        return stream

    def wait_closed(self, timeout: float | None = None) -> bool:
        """Waits until the connection has gone, at most `timeout` seconds; whether it has."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Ends the connection; calls under way raise ConnectionClosed. May be called twice."""
        self._shut("the client was closed")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # For Stream

    def _begin(self, stream: Stream, make: Callable[[ClientConnection], tuple[int, bytes]]) -> int:
        with _Within(self._sending, stream):
            with self._state:
                self._check_open()
                stream_id, raw = make(self._protocol)
                self._streams[stream_id] = stream
            try:
                self._send(raw, stream)
            except StatusError:
                self._forget(stream_id)
                raise
        return stream_id

    def _write(self, stream: Stream, make: Callable[[ClientConnection], bytes]) -> None:
        with _Within(self._sending, stream):
            with self._state:
                self._check_open()
                raw = make(self._protocol)
            self._send(raw, stream)

    def _forget(self, stream_id: int) -> None:
        with self._state:
            self._protocol.forget(stream_id)
            self._streams.pop(stream_id, None)

    def _check_open(self) -> None:
        if self._closed is not None:
            raise ConnectionClosed(self._closed)

    def _send(self, raw: bytes, stream: Stream) -> None:
        """Writes a frame whole or closes the connection, as half a one spoils all that follow."""
        rest = memoryview(raw)
        try:
            while rest:
                try:
                    rest = rest[self._sock.send(rest, _socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    self._wait_writable(stream)
        except StatusError:
            if len(rest) < len(raw):
                self._shut("a frame could not be written whole before its call's deadline")
            raise
        except OSError as error:
            self._shut(f"writing failed: {error.strerror}")
            raise ConnectionClosed(self._closed) from None

    def _wait_writable(self, stream: Stream) -> None:
        poll = select.poll()
        poll.register(self._sock.fileno(), select.POLLOUT)
        left = stream.left()
        if not poll.poll(None if left is None else left * 1000):
            raise stream.too_late()

    def _read(self) -> None:
        reason = "the peer closed the connection"
        while True:
            try:
                data = self._sock.recv(_READ)
            except OSError as error:
                reason = f"reading failed: {error.strerror}"
                break
            if not data:
                break
            with self._state:
                for event in self._protocol.receive(data):
                    self._deliver(event)
        self._shut(reason)
        with self._sending:  # nobody is within send() when the descriptor goes
            self._sock.close()

    def _deliver(self, event: ClientEvent) -> None:
        is_data = isinstance(event, DataReceived)
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            if not is_data:
                del self._streams[event.stream_id]
            stream.put(event)

    def _shut(self, reason: str) -> None:
        with self._state:
            if self._closed is not None:
                return
            self._closed = reason
            orphans = list(self._streams.values())
            self._streams.clear()
            hang_up(self._sock)
        for stream in orphans:
            stream.put(ConnectionClosed(reason))


class Stream:
    """One call under way; made by Client.stream. Used by one thread, or one for each direction."""

    def __init__(self, client: Client, name: str, timeout: float | None) -> None:
        self._client = client
        self._name = name
        self._timeout = timeout
        self._deadline = None if timeout is None else monotonic() + timeout
        self._id = 0
        self._arrived: deque[ClientEvent | ConnectionClosed] = deque()
        self._news = threading.Semaphore(0)
        self._over = False

    def send(self, payload: bytes) -> None:
        """Sends one message. Raises StreamClosed after `close_send` or the call's end."""
        self._client._write(self, lambda core: core.send_data(self._id, payload))

    def close_send(self) -> None:
        """Says that no more messages come from this side."""
        self._client._write(self, lambda core: core.end_data(self._id))

    def recv(self) -> bytes | None:
        """The next message, None when there are no more. Raises as `Client.call`.

        A response frame, which ends a stream too, counts as a message unless it is empty.
        """
        if self._over:
            return None
        event = self._next()
        if isinstance(event, DataReceived):
            return event.payload
        self._over = True
        if isinstance(event, DataEnded):
            return None
        if event.error is not None:
            raise event.error
        return event.payload or None

    def response(self) -> bytes:
        """The answer of a call that is answered once. Raises as `Client.call`."""
        return self.recv() or b""

    def __iter__(self) -> Iterator[bytes]:
        while (payload := self.recv()) is not None:
            yield payload

    def left(self) -> float | None:
        """Seconds until the deadline, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - monotonic())

    def too_late(self) -> StatusError:
        text = f"{self._name}: no answer within {self._timeout:g} s"
        return StatusError(DEADLINE_EXCEEDED, text)

    # For Client

    def start(
        self,
        service: str,
        method: str,
        payload: bytes,
        metadata: Mapping[str, str] | None,
        flags: int,
    ) -> None:
        def make(core: ClientConnection) -> tuple[int, bytes]:
            return core.request(
                service, method, payload, timeout=self._timeout, metadata=metadata, flags=flags
            )

        self._id = self._client._begin(self, make)

    def put(self, event: ClientEvent | ConnectionClosed) -> None:
        self._arrived.append(event)
        self._news.release()

    def _next(self) -> ClientEvent:
        if not self._news.acquire(timeout=self.left()):
            self._client._forget(self._id)
            raise self.too_late()
        event = self._arrived.popleft()
        if isinstance(event, ConnectionClosed):
            raise event
        return event


class _Within:
    """Holds a lock, waiting for it no longer than the call may take."""

    __slots__ = ("_lock", "_stream")

    def __init__(self, lock: threading.Lock, stream: Stream) -> None:
        self._lock = lock
        self._stream = stream

    def __enter__(self) -> None:
        left = self._stream.left()
        if not self._lock.acquire(timeout=-1 if left is None else left):
            raise self._stream.too_late()

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
