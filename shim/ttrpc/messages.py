"""The two messages that every call travels in, kept in step with proto/ttrpc.proto by a test."""

from __future__ import annotations

from shim.protowire import Message, bytes_, int32, int64, message, repeated, string
from shim.ttrpc.status import OK, UNKNOWN, StatusError

_MAX_NANO = (1 << 63) - 1
_MAX_CODE = (1 << 31) - 1


class KeyValue(Message):
    """One entry of a call's metadata; a key may come more than once."""

    key: str = string(1)
    value: str = string(2)


class Request(Message):
    """What a request frame carries."""

    service: str = string(1)
    method: str = string(2)
    payload: bytes = bytes_(3)
    timeout_nano: int = int64(4)
    metadata: list[KeyValue] = repeated(message(5, KeyValue))


class Route(Message):
    """As much of a Request as tells where it goes; the rest stays undecoded."""

    service: str = string(1)
    method: str = string(2)


class Status(Message):
    """google.rpc.Status; its details stay unknown fields."""

    code: int = int32(1)
    message: str = string(2)


class Response(Message):
    """What a response frame carries; an absent status is OK."""

    status: Status | None = message(1, Status)
    payload: bytes = bytes_(2)


def nano(timeout: float | None) -> int:
    """Seconds as the wire has them; 0 means no deadline, so no deadline is rounded to it."""
    if timeout is None:
        return 0
    return _MAX_NANO if timeout >= _MAX_NANO / 1e9 else max(1, int(timeout * 1e9))


def seconds(timeout_nano: int) -> float | None:
    """The wire's timeout in seconds; one already over is 0."""
    return max(0.0, timeout_nano / 1e9) if timeout_nano else None


def metadata_dict(entries: list[KeyValue]) -> dict[str, str]:
    """The metadata by key; of several values the first, which is the one Go's look-up gives."""
    found: dict[str, str] = {}
    for entry in entries:
        found.setdefault(entry.key, entry.value)
    return found


def error_response(error: StatusError) -> bytes:
    """The encoded Response that carries `error`, whatever was put into it: it must always go out.

    A text is cut at 1 MiB; a code that is none, or OK, is told as UNKNOWN.
    """
    text = str(error.message).encode("utf-8", "replace")[: 1 << 20].decode("utf-8", "ignore")
    code = error.code if OK < error.code <= _MAX_CODE else UNKNOWN
    return Response(status=Status(code=code, message=text)).encode()
