"""The protocol's state machine for both roles: bytes in, events out; calls in, bytes out.

No sockets, no threads, no clock. Each role keeps a table of its open streams and nothing more; a
stream leaves the table when it is over. What a client does wrong is answered on the stream it did
it on and the connection stays up, as the Go server does (containerd/ttrpc: server.go); what a
server does wrong fails that one call.

    server's view of a stream          client's view of a stream

       request, flags 0 or RC             request sent
    ---------------> half closed      ---------------> waiting
       request, RO                        data, data, ...
    ---------------> open                 response, or data with RC
         | data ...                    ---------------> gone
         | data with RC
         +---------> half closed
       response or data with RC sent
    ---------------> gone
"""

from __future__ import annotations

from shim.protowire import DecodeError
from shim.ttrpc.events import (
    DataEnded,
    DataReceived,
    Refused,
    RequestReceived,
    ResponseReceived,
)
from shim.ttrpc.frames import (
    DATA,
    MAX_DATA,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    REQUEST,
    RESPONSE,
    Frame,
    FrameReader,
    Oversize,
    frame,
    too_long,
)
from shim.ttrpc.messages import (
    KeyValue,
    Request,
    Response,
    error_response,
    metadata_dict,
    nano,
    seconds,
)
from shim.ttrpc.status import INTERNAL, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ServerEvent = RequestReceived | DataReceived | DataEnded | Refused
ClientEvent = ResponseReceived | DataReceived | DataEnded

_MAX_STREAM_ID = (1 << 32) - 1


class StreamClosed(Exception):
    """The caller of the core wrote to a stream that is over, was refused or never began."""


class StreamIds:
    """The rule for the ids of requests: odd, and each higher than the last; gaps are fine."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def refuse(self, stream_id: int) -> StatusError | None:
        """Why the id cannot be taken, or None, which takes it."""
        if stream_id % 2 == 0:
            return even_id()
        if stream_id <= self._last:
            return StatusError(INVALID_ARGUMENT, "StreamID cannot be re-used and must increment")
        self._last = stream_id
        return None


def even_id() -> StatusError:
    return StatusError(INVALID_ARGUMENT, "StreamID must be odd for client initiated streams")


def bad_request(error: DecodeError) -> StatusError:
    return StatusError(INVALID_ARGUMENT, f"unmarshal request error: {error}")


def response(stream_id: int, payload: bytes) -> bytes:
    """The frame that ends a call well. One that would be too long ends it with an error instead."""
    data = Response(payload=payload).encode()
    if len(data) > MAX_DATA:
        return failure(stream_id, too_long(len(data)))
    return frame(stream_id, RESPONSE, 0, data)


def failure(stream_id: int, error: StatusError) -> bytes:
    """The frame that ends a call with a status."""
    return frame(stream_id, RESPONSE, 0, error_response(error))


class ServerConnection:
    """One accepted connection."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._ids = StreamIds()
        self._open: dict[int, bool] = {}  # stream id: whether the client may still send data

    @property
    def streams(self) -> int:
        """How many calls are under way."""
        return len(self._open)

    def receive(self, data: bytes) -> list[ServerEvent]:
        """What `data` brought about. Raises nothing, whatever the bytes are."""
        events: list[ServerEvent] = []
        for item in self._reader.feed(data):
            if isinstance(item, Oversize):
                events.append(self._refuse(item.stream_id, item.error))
            elif item.stream_id % 2 == 0:
                events.append(self._refuse(item.stream_id, even_id()))
            elif item.kind == REQUEST:
                events.append(self._request(item))
            elif item.kind == DATA:
                events.extend(self._data(item))
            # Other kinds are left for a protocol to come.
        return events

    def respond(self, stream_id: int, payload: bytes) -> bytes:
        """Ends the call well. Raises StreamClosed."""
        self._finish(stream_id)
        return response(stream_id, payload)

    def fail(self, stream_id: int, error: StatusError) -> bytes:
        """Ends the call with a status. Raises StreamClosed."""
        self._finish(stream_id)
        return failure(stream_id, error)

    def send_data(self, stream_id: int, payload: bytes) -> bytes:
        """One message of the answering stream. Raises StreamClosed, StatusError if too long."""
        if stream_id not in self._open:
            raise StreamClosed(f"stream {stream_id} is not open")
        return frame(stream_id, DATA, 0, payload)

    def end_data(self, stream_id: int) -> bytes:
        """Ends a streaming call well. Raises StreamClosed."""
        self._finish(stream_id)
        return frame(stream_id, DATA, REMOTE_CLOSED | NO_DATA)

    def _finish(self, stream_id: int) -> None:
        if self._open.pop(stream_id, None) is None:
            raise StreamClosed(f"stream {stream_id} is not open")

    def _refuse(self, stream_id: int, error: StatusError) -> Refused:
        self._open.pop(stream_id, None)
        return Refused(stream_id, error, failure(stream_id, error))

    def _request(self, item: Frame) -> ServerEvent:
        error = self._ids.refuse(item.stream_id)
        if error is not None:
            return self._refuse(item.stream_id, error)
        try:
            request = Request.decode(item.data)
        except DecodeError as decode_error:
            return self._refuse(item.stream_id, bad_request(decode_error))
        is_open = item.flags & REMOTE_OPEN != 0
        self._open[item.stream_id] = is_open
        return RequestReceived(
            item.stream_id,
            request.service,
            request.method,
            request.payload,
            timeout=seconds(request.timeout_nano),
            metadata=metadata_dict(request.metadata),
            open=is_open,
        )

    def _data(self, item: Frame) -> Iterator[ServerEvent]:
        is_open = self._open.get(item.stream_id)
        if is_open is None:
            error = StatusError(INVALID_ARGUMENT, "StreamID is no longer active")
            yield self._refuse(item.stream_id, error)
        elif not is_open:
            error = StatusError(INVALID_ARGUMENT, "data handling error: the stream was closed")
            yield self._refuse(item.stream_id, error)
        elif item.flags & REMOTE_CLOSED and item.data:
            error = StatusError(INVALID_ARGUMENT, "data close message cannot include data")
            yield self._refuse(item.stream_id, error)
        else:
            if not item.flags & NO_DATA:
                yield DataReceived(item.stream_id, item.data)
            if item.flags & REMOTE_CLOSED:
                self._open[item.stream_id] = False
                yield DataEnded(item.stream_id)


class _ClientStream:
    __slots__ = ("may_send", "takes_data")

    def __init__(self, takes_data: bool, may_send: bool) -> None:
        self.takes_data = takes_data
        self.may_send = may_send


class ClientConnection:
    """One connection that was made."""

    def __init__(self) -> None:
        self._reader = FrameReader()
        self._next_id = 1
        self._open: dict[int, _ClientStream] = {}

    def request(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout: float | None = None,
        metadata: Mapping[str, str] | None = None,
        flags: int = 0,
    ) -> tuple[int, bytes]:
        """Begins a call: its stream id, and the frame, which must be sent before any later one's.

        `timeout` in seconds; `flags` 0 for a unary call, REMOTE_CLOSED to take a stream,
        REMOTE_OPEN to send one too. Raises StatusError (RESOURCE_EXHAUSTED) if it is too long for
        a frame or the connection has used up its ids; nothing has then happened.
        """
        if self._next_id > _MAX_STREAM_ID:
            raise StatusError(RESOURCE_EXHAUSTED, "the connection's stream ids are used up")
        entries = [KeyValue(key=key, value=value) for key, value in (metadata or {}).items()]
        request = Request(
            service=service,
            method=method,
            payload=payload,
            timeout_nano=nano(timeout),
            metadata=entries,
        )
        stream_id = self._next_id
        raw = frame(stream_id, REQUEST, flags, request.encode())
        self._next_id += 2
        self._open[stream_id] = _ClientStream(flags != 0, flags & REMOTE_OPEN != 0)
        return stream_id, raw

    def send_data(self, stream_id: int, payload: bytes) -> bytes:
        """One message of the stream. Raises StreamClosed, StatusError if too long."""
        self._sending(stream_id)
        return frame(stream_id, DATA, 0, payload)

    def end_data(self, stream_id: int) -> bytes:
        """Says that no more data comes from this side. Raises StreamClosed."""
        self._sending(stream_id).may_send = False
        return frame(stream_id, DATA, REMOTE_CLOSED | NO_DATA)

    def forget(self, stream_id: int) -> None:
        """Gives a call up. The protocol has no word for that: a late answer is just ignored."""
        self._open.pop(stream_id, None)

    def receive(self, data: bytes) -> list[ClientEvent]:
        """What `data` brought about; frames of streams not open are ignored. Raises nothing."""
        events: list[ClientEvent] = []
        for item in self._reader.feed(data):
            stream = self._open.get(item.stream_id)
            if stream is None:
                continue
            if isinstance(item, Oversize):
                events.append(self._over(item.stream_id, error=item.error))
            elif item.kind == RESPONSE:
                events.append(self._response(item))
            elif item.kind == DATA and stream.takes_data:
                events.extend(self._data(item))
            else:
                text = f"a frame of kind {item.kind} came where a response was due"
                events.append(self._over(item.stream_id, error=StatusError(INTERNAL, text)))
        return events

    def _sending(self, stream_id: int) -> _ClientStream:
        stream = self._open.get(stream_id)
        if stream is None or not stream.may_send:
            raise StreamClosed(f"stream {stream_id} takes no more data")
        return stream

    def _over(
        self, stream_id: int, payload: bytes = b"", error: StatusError | None = None
    ) -> ResponseReceived:
        del self._open[stream_id]
        return ResponseReceived(stream_id, payload, error)

    def _response(self, item: Frame) -> ResponseReceived:
        try:
            answer = Response.decode(item.data)
        except DecodeError as decode_error:
            text = f"the answer could not be decoded: {decode_error}"
            return self._over(item.stream_id, error=StatusError(INTERNAL, text))
        if answer.status is not None and answer.status.code:
            error = StatusError(answer.status.code, answer.status.message)
            return self._over(item.stream_id, answer.payload, error)
        return self._over(item.stream_id, answer.payload)

    def _data(self, item: Frame) -> Iterator[ClientEvent]:
        if not item.flags & NO_DATA:
            yield DataReceived(item.stream_id, item.data)
        if item.flags & REMOTE_CLOSED:
            del self._open[item.stream_id]
            yield DataEnded(item.stream_id)
