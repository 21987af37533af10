"""What can happen on a connection, as the protocol core tells it."""

from __future__ import annotations

from shim.ttrpc.status import StatusError


class _Event:
    __slots__: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._values() == other._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        values = zip(self.__slots__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"

    def _values(self) -> list[object]:
        return [getattr(self, name) for name in self.__slots__]


class RequestReceived(_Event):
    """Server: a call begins.

    `timeout` is in seconds, None for none; `open` says that data frames will follow.
    """

    __slots__ = (
        "metadata",
        "method",
        "open",
        "payload",
        "service",
        "stream_id",
        "timeout",
    )

    def __init__(
        self,
        stream_id: int,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout: float | None = None,
        metadata: dict[str, str] | None = None,
        open: bool = False,
    ) -> None:
        self.stream_id = stream_id
        self.service = service
        self.method = method
        self.payload = payload
        self.timeout = timeout
        self.metadata = metadata or {}
        self.open = open


class DataReceived(_Event):
    """Either side: one message of a stream."""

    __slots__ = ("payload", "stream_id")

    def __init__(self, stream_id: int, payload: bytes) -> None:
        self.stream_id = stream_id
        self.payload = payload


class DataEnded(_Event):
    """Either side: the peer sends no more data. To a client: the call is over and went well."""

    __slots__ = ("stream_id",)

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


class ResponseReceived(_Event):
    """Client: a call is over; `error` is None if it went well."""

    __slots__ = ("error", "payload", "stream_id")

    def __init__(
        self, stream_id: int, payload: bytes = b"", error: StatusError | None = None
    ) -> None:
        self.stream_id = stream_id
        self.payload = payload
        self.error = error


class Refused(_Event):
    """Server: a frame broke a rule; `answer` must be sent, and the connection goes on.

    If a stream of that id was open, it is over.
    """

    __slots__ = ("answer", "error", "stream_id")

    def __init__(self, stream_id: int, error: StatusError, answer: bytes) -> None:
        self.stream_id = stream_id
        self.error = error
        self.answer = answer
