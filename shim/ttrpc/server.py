"""The server: a thread per connection that reads, and one per call that answers.

Simple rather than fast; the shim's own daemon is the proxy. A handler may take as long as it likes
without holding up other calls, and whatever it raises becomes a status. When the caller goes, its
handlers run on and their answers are dropped.
"""

from __future__ import annotations

import _socket
import threading
from collections import deque
from functools import partial
from itertools import count
from time import monotonic

from shim.ttrpc.connection import ServerConnection, StreamClosed
from shim.ttrpc.events import DataEnded, DataReceived, Refused, RequestReceived
from shim.ttrpc.handlers import Call, as_status
from shim.ttrpc.sockets import accept, hang_up, is_same_user
from shim.ttrpc.status import (
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
    ConnectionClosed,
    StatusError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from shim.ttrpc.connection import ServerEvent

    Unary = Callable[[Call], bytes]

_READ = 1 << 16
_MAX_CALLS = 256  # of one connection at a time; a peer may not have us start threads without end
_STREAM_BACKLOG = 64  # messages, as Go's
_ACCEPT_PAUSE = 0.1  # seconds without accepting when the system is out of something
_BACKLOG_WAIT = 1.0  # seconds that reading waits for a full backlog, as Go does


class Streaming:
    """Marks a handler that takes or sends a stream of messages.

    It is called with the call and a ServerStream; returning bytes ends the stream with a response,
    returning None ends it with an empty data frame, which is what a caller of a stream expects.
    """

    __slots__ = ("handler",)

    def __init__(self, handler: Callable[[Call, ServerStream], bytes | None]) -> None:
        self.handler = handler


class Server:
    """Serves `handlers`, by service and method, to peers of our own user; owns the listener."""

    def __init__(
        self, listener: _socket.socket, handlers: Mapping[str, Mapping[str, Unary | Streaming]]
    ) -> None:
        self._listener = listener
        self._handlers = handlers
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._connections: dict[int, _Connection] = {}
        self._ids = count(1)
        self._stopping = threading.Event()

    def run(self) -> None:
        """Accepts connections until `stop`."""
        try:
            while not self._stopping.is_set():
                try:
                    sock = accept(self._listener)
                    self._welcome(sock)
                except (OSError, RuntimeError):  # stopped; or out of descriptors or threads
                    self._stopping.wait(_ACCEPT_PAUSE)
        finally:
            self._listener.close()

    def _welcome(self, sock: _socket.socket) -> None:
        connection = _Connection(self, next(self._ids), sock)
        try:
            with self._lock:
                if is_same_user(sock) and not self._stopping.is_set():
                    connection.start()
                    self._connections[connection.number] = connection
                    return
            sock.close()
        except RuntimeError:
            sock.close()
            raise

    def stop(self, grace: float = 1.0) -> None:
        """Stops accepting, waits at most `grace` seconds for calls under way, then closes all."""
        self._stopping.set()
        hang_up(self._listener)  # wakes accept()
        deadline = monotonic() + grace
        with self._lock:
            while any(connection.busy for connection in self._connections.values()):
                if not self._idle.wait(deadline - monotonic()):
                    break
            connections = list(self._connections.values())
        for connection in connections:
            connection.shut()

    def find(self, service: str, method: str) -> Unary | Streaming:
        """The handler, or a StatusError (UNIMPLEMENTED) worded as Go's."""
        methods = self._handlers.get(service)
        if methods is None:
            raise StatusError(UNIMPLEMENTED, f"service {service}")
        handler = methods.get(method)
        if handler is None:
            raise StatusError(UNIMPLEMENTED, f"method {method}")
        return handler

    def call_ended(self) -> None:
        with self._lock:
            self._idle.notify_all()

    def connection_ended(self, number: int) -> None:
        with self._lock:
            self._connections.pop(number, None)
            self._idle.notify_all()


class _Connection:
    def __init__(self, server: Server, number: int, sock: _socket.socket) -> None:
        self.number = number
        self._server = server
        self._sock = sock
        self._protocol = ServerConnection()
        self._lock = threading.Lock()  # guards the core and the order of what is written
        self._inputs: dict[int, ServerStream] = {}
        self._calls: set[int] = set()  # stream ids of those whose handlers run

    @property
    def busy(self) -> bool:
        return bool(self._calls)

    def start(self) -> None:
        threading.Thread(target=self._run, name="ttrpc server", daemon=True).start()

    def _run(self) -> None:
        try:
            while data := self._sock.recv(_READ):
                with self._lock:
                    events = self._protocol.receive(data)
                for event in events:
                    self._handle(event)
        except OSError:  # the peer went; so do we
            pass
        finally:
            self.shut()
            for stream in list(self._inputs.values()):
                stream.peer_gone()
            self._server.connection_ended(self.number)
            with self._lock:  # nobody is within sendall() when the descriptor goes
                self._sock.close()

    def shut(self) -> None:
        hang_up(self._sock)

    def send(self, make: Callable[[ServerConnection], bytes]) -> None:
        """Writes the frame that the core makes. Raises StreamClosed, ConnectionClosed."""
        with self._lock:
            raw = make(self._protocol)
            try:
                self._sock.sendall(raw)
            except OSError as error:
                raise ConnectionClosed(f"writing failed: {error.strerror}") from None

    def _handle(self, event: ServerEvent) -> None:
        if isinstance(event, RequestReceived):
            self._begin(event)
        elif isinstance(event, Refused):
            self._drop_input(event.stream_id)
            answer = event.answer
            self.send(lambda core: answer)
        else:
            self._input(event)

    def _begin(self, event: RequestReceived) -> None:
        try:
            if len(self._calls) >= _MAX_CALLS:
                raise StatusError(RESOURCE_EXHAUSTED, f"more than {_MAX_CALLS} calls at once")
            handler = self._server.find(event.service, event.method)
            answer = self._prepare(event, handler)
            thread = threading.Thread(
                target=self._answer, args=(answer, event.stream_id), name="ttrpc call", daemon=True
            )
            self._calls.add(event.stream_id)
            thread.start()
        except StatusError as error:
            self._fail(event.stream_id, error)
        except RuntimeError as error:  # no more threads to be had
            self._calls.discard(event.stream_id)
            self._fail(event.stream_id, StatusError(RESOURCE_EXHAUSTED, str(error)))

    def _prepare(
        self, event: RequestReceived, handler: Unary | Streaming
    ) -> Callable[[], bytes | None]:
        call = Call(
            event.service,
            event.method,
            event.payload,
            timeout=event.timeout,
            metadata=event.metadata,
            connection=self.number,
        )
        if not isinstance(handler, Streaming):
            return partial(handler, call)
        stream = ServerStream(self, event.stream_id, sends=event.open)
        self._inputs[event.stream_id] = stream
        return partial(handler.handler, call, stream)

    def _answer(self, answer: Callable[[], bytes | None], stream_id: int) -> None:
        try:
            result = answer()
            if result is None:
                self.send(lambda core: core.end_data(stream_id))
            else:
                payload = result
                self.send(lambda core: core.respond(stream_id, payload))
        except (StreamClosed, ConnectionClosed):  # nobody is left to answer
            pass
        except BaseException as error:
            self._fail(stream_id, as_status(error))
        finally:
            self._drop_input(stream_id)
            self._calls.discard(stream_id)
            self._server.call_ended()

    def _fail(self, stream_id: int, status: StatusError) -> None:
        try:
            self.send(lambda core: core.fail(stream_id, status))
        except (StreamClosed, ConnectionClosed):  # nobody is left to tell
            return

    def _input(self, event: DataReceived | DataEnded) -> None:
        stream = self._inputs.get(event.stream_id)
        if stream is None:  # a unary method, or one that has already answered
            return
        if isinstance(event, DataEnded):
            stream.end()
        elif not stream.put(event.payload):
            self._drop_input(event.stream_id)
            status = StatusError(
                INVALID_ARGUMENT, "data handling error: the stream's buffer is full"
            )
            self._fail(event.stream_id, status)

    def _drop_input(self, stream_id: int) -> None:
        stream = self._inputs.pop(stream_id, None)
        if stream is not None:
            stream.peer_gone()


class ServerStream:
    """A streaming handler's side of its stream."""

    def __init__(self, connection: _Connection, stream_id: int, *, sends: bool) -> None:
        self._stream_id = stream_id
        self._connection = connection
        self._messages: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._ended = not sends
        self._gone = False

    def send(self, payload: bytes) -> None:
        """Sends one message. Raises StreamClosed, ConnectionClosed."""
        self._connection.send(lambda core: core.send_data(self._stream_id, payload))

    def recv(self) -> bytes | None:
        """The next message, None when the caller sends no more. Raises ConnectionClosed."""
        with self._changed:
            while not self._messages:
                if self._ended:
                    return None
                if self._gone:
                    raise ConnectionClosed("the caller went away or broke the protocol")
                self._changed.wait()
            self._changed.notify_all()
            return self._messages.popleft()

    def __iter__(self) -> Iterator[bytes]:
        while (payload := self.recv()) is not None:
            yield payload

    # For the connection's reader

    def put(self, payload: bytes) -> bool:
        with self._changed:
            room = self._changed.wait_for(self._has_room, _BACKLOG_WAIT)
            if room:
                self._messages.append(payload)
                self._changed.notify_all()
            return room

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def peer_gone(self) -> None:
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return len(self._messages) < _STREAM_BACKLOG
