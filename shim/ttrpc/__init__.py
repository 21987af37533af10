"""ttrpc, the small RPC protocol between containerd and its shims, as a library.

It needs nothing but the standard library and `shim/protowire.py` beside it, knows nothing of
containers, and may be copied elsewhere whole. In layers, each usable alone:

    frames, messages      bytes to frames and back; the two messages
    connection, events    the protocol without I/O: bytes in, events out
    client, server        the same with sockets and threads
    proxy                 frames handed through, a few calls answered on the way

A client, a server and a proxy that answers one call itself:

    >>> import os, socket, tempfile, threading
    >>> from shim import ttrpc
    >>> def listen(path):
    ...     listener = socket.socket(socket.AF_UNIX)
    ...     listener.bind(path)
    ...     listener.listen()
    ...     return listener
    >>> directory = tempfile.TemporaryDirectory()
    >>> inner, outer = (os.path.join(directory.name, name) for name in ("inner", "outer"))

    >>> def echo(call):
    ...     return call.payload
    >>> server = ttrpc.Server(listen(inner), {"example.Echo": {"Echo": echo, "Shout": echo}})
    >>> threading.Thread(target=server.run).start()

    >>> def shout(call):
    ...     if not call.payload:
    ...         return ttrpc.FORWARD
    ...     return call.payload.upper()
    >>> def handler_for(service, method):
    ...     return shout if method == "Shout" else None
    >>> proxy = ttrpc.Proxy(listen(outer), lambda: ttrpc.connect(inner), handler_for)
    >>> threading.Thread(target=proxy.run).start()

    >>> with ttrpc.Client(ttrpc.connect(outer)) as client:
    ...     print(client.call("example.Echo", "Echo", b"hello", timeout=5.0))
    ...     print(client.call("example.Echo", "Shout", b"hello", metadata={"who": "me"}))
    ...     try:
    ...         client.call("example.Echo", "Sing")
    ...     except ttrpc.StatusError as error:
    ...         print(error)
    b'hello'
    b'HELLO'
    method Sing (ttrpc code 12)

    >>> proxy.stop()
    >>> server.stop()
    >>> directory.cleanup()
"""

from shim.ttrpc.client import Client, Stream
from shim.ttrpc.connection import ClientConnection, ServerConnection, StreamClosed
from shim.ttrpc.frames import MAX_DATA
from shim.ttrpc.handlers import FORWARD, Call, Forward
from shim.ttrpc.proxy import Proxy
from shim.ttrpc.server import Server, ServerStream, Streaming
from shim.ttrpc.sockets import connect, is_same_user, socket_path
from shim.ttrpc.status import (
    ABORTED,
    ALREADY_EXISTS,
    CANCELLED,
    DATA_LOSS,
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OK,
    OUT_OF_RANGE,
    PERMISSION_DENIED,
    RESOURCE_EXHAUSTED,
    UNAUTHENTICATED,
    UNAVAILABLE,
    UNIMPLEMENTED,
    UNKNOWN,
    ConnectionClosed,
    StatusError,
)

__all__ = [
    "ABORTED",
    "ALREADY_EXISTS",
    "CANCELLED",
    "DATA_LOSS",
    "DEADLINE_EXCEEDED",
    "FAILED_PRECONDITION",
    "FORWARD",
    "INTERNAL",
    "INVALID_ARGUMENT",
    "MAX_DATA",
    "NOT_FOUND",
    "OK",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNIMPLEMENTED",
    "UNKNOWN",
    "Call",
    "Client",
    "ClientConnection",
    "ConnectionClosed",
    "Forward",
    "Proxy",
    "Server",
    "ServerConnection",
    "ServerStream",
    "StatusError",
    "Stream",
    "StreamClosed",
    "Streaming",
    "connect",
    "is_same_user",
    "socket_path",
]
