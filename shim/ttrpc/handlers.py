"""What a server and the proxy hand to the code that answers calls, and how its outcome is read."""

from __future__ import annotations

import sys

from shim.ttrpc.status import UNKNOWN, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Call:
    """One call, as its handler sees it.

    `timeout` is what the caller allows, in seconds from the call's arrival, None for no limit;
    `connection` tells connections apart and is never used twice.
    """

    __slots__ = ("connection", "metadata", "method", "payload", "service", "timeout")

    def __init__(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout: float | None = None,
        metadata: dict[str, str] | None = None,
        connection: int = 0,
    ) -> None:
        self.service = service
        self.method = method
        self.payload = payload
        self.timeout = timeout
        self.metadata = metadata or {}
        self.connection = connection

    def __repr__(self) -> str:
        return f"<Call {self.service}/{self.method} on connection {self.connection}>"


class Forward:
    """The type of FORWARD."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "FORWARD"


FORWARD = Forward()
"""What a proxy's handler returns to have the request sent on untouched."""

if TYPE_CHECKING:
    Handler = Callable[[Call], bytes | Forward]


def as_status(error: BaseException) -> StatusError:
    """The status for what a handler raised; what was not meant as one is shown on stderr too."""
    if isinstance(error, StatusError):
        return error
    sys.excepthook(type(error), error, error.__traceback__)
    return StatusError(UNKNOWN, str(error) or type(error).__name__)
