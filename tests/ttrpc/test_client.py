"""The client against a raw peer and against our server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from shim import ttrpc
from shim.ttrpc.connection import ServerConnection, ServerEvent
from shim.ttrpc.events import RequestReceived
from tests.ttrpc.peers import TIMEOUT, listen, serving


class RawServer:
    """The server's end of a socketpair without a server."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(TIMEOUT)
        self.core = ServerConnection()
        self._events: list[ServerEvent] = []

    def request(self) -> RequestReceived:
        while not self._events:
            data = self.sock.recv(1 << 16)
            assert data, "the client went away"
            self._events = self.core.receive(data)
        event = self._events.pop(0)
        assert isinstance(event, RequestReceived)
        return event

    def answer(self, stream_id: int, payload: bytes) -> None:
        self.sock.sendall(self.core.respond(stream_id, payload))


@pytest.fixture
def pair() -> Iterator[tuple[ttrpc.Client, RawServer]]:
    ours, theirs = socket.socketpair()
    with ttrpc.Client(ours) as client, theirs:
        yield client, RawServer(theirs)


def test_calls_at_once_are_answered_out_of_order(pair: tuple[ttrpc.Client, RawServer]) -> None:
    client, server = pair
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(client.call, "s", "m", str(n).encode(), timeout=TIMEOUT) for n in range(8)
        ]
        requests = [server.request() for _ in answers]
        for request in reversed(requests):
            server.answer(request.stream_id, b"to " + request.payload)
        assert [answer.result() for answer in answers] == [f"to {n}".encode() for n in range(8)]


def test_ids_on_the_wire_only_grow_whatever_the_threads_do(
    pair: tuple[ttrpc.Client, RawServer],
) -> None:
    client, server = pair
    threads, each = 16, 50

    def caller() -> None:
        for _ in range(each):
            client.call("s", "m", b"x" * 300, timeout=TIMEOUT)

    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(caller) for _ in range(threads)]
        ids = []
        for _ in range(threads * each):
            request = server.request()  # it would refuse an id that does not grow
            ids.append(request.stream_id)
            server.answer(request.stream_id, b"")
        for each_done in done:
            each_done.result()
    assert ids == list(range(1, 2 * threads * each, 2))


def test_a_deadline_ends_the_wait_and_the_late_answer_disturbs_nobody(
    pair: tuple[ttrpc.Client, RawServer],
) -> None:
    client, server = pair
    with pytest.raises(ttrpc.StatusError, match=r"s/m: no answer within 0\.05 s") as caught:
        client.call("s", "m", timeout=0.05)
    assert caught.value.code == ttrpc.DEADLINE_EXCEEDED
    assert not client._streams
    assert not client._protocol._open
    late = server.request()
    assert late.timeout == pytest.approx(0.05)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, "s", "m", timeout=TIMEOUT)
        request = server.request()
        server.answer(late.stream_id, b"late")
        server.answer(request.stream_id, b"in time")
        assert answer.result() == b"in time"


def test_a_call_under_way_learns_that_the_peer_went(pair: tuple[ttrpc.Client, RawServer]) -> None:
    client, server = pair
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, "s", "m")
        server.request()
        server.sock.close()
        with pytest.raises(ttrpc.ConnectionClosed, match="peer closed"):
            answer.result()
    assert client.wait_closed(TIMEOUT)
    with pytest.raises(ttrpc.ConnectionClosed):
        client.call("s", "m")


def test_close_ends_calls_under_way(pair: tuple[ttrpc.Client, RawServer]) -> None:
    client, server = pair
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, "s", "m")
        server.request()
        assert not client.wait_closed(0)
        client.close()
        client.close()
        with pytest.raises(ttrpc.ConnectionClosed, match="client was closed"):
            answer.result()


def test_a_peer_that_does_not_read_cannot_hold_a_caller_past_its_deadline(
    pair: tuple[ttrpc.Client, RawServer],
) -> None:
    client, _ = pair
    with pytest.raises(ttrpc.StatusError) as caught:
        client.call("s", "m", bytes(2 << 20), timeout=0.1)
    assert caught.value.code == ttrpc.DEADLINE_EXCEEDED
    # Half a frame was written, so the connection had to go.
    assert client.wait_closed(TIMEOUT)
    with pytest.raises(ttrpc.ConnectionClosed, match="whole"):
        client.call("s", "m")


def test_an_exception_is_raised_for_each_status(inner: Path) -> None:
    def refuse(call: ttrpc.Call) -> bytes:
        raise ttrpc.StatusError(ttrpc.NOT_FOUND, "no such task")

    with (
        serving(inner, {"svc": {"Refuse": refuse}}),
        ttrpc.Client(ttrpc.connect(str(inner))) as client,
    ):
        with pytest.raises(ttrpc.StatusError) as caught:
            client.call("svc", "Refuse")
        assert (caught.value.code, caught.value.message) == (ttrpc.NOT_FOUND, "no such task")
        assert str(caught.value) == "no such task (ttrpc code 5)"


@pytest.mark.parametrize("form", ["{path}", "unix://{path}", "unix://@{path}"])
def test_connect_takes_the_forms_of_address_that_containerd_writes(form: str, inner: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0{inner}" if "@" in form else str(inner))
    listener.listen()
    with listener, closing(ttrpc.connect(form.format(path=inner))) as sock:
        assert sock.gettimeout() is None
        listener.accept()[0].close()


def test_connect_says_where_it_could_not_connect(inner: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(inner)):
        ttrpc.connect(f"unix://{inner}")
    listen(inner).close()
    with pytest.raises(ConnectionRefusedError, match=str(inner)):
        ttrpc.connect(str(inner))
    with pytest.raises(ValueError, match="not the address"):
        ttrpc.connect("tcp://localhost:1")


def test_connect_does_not_wait_for_ever_on_a_full_backlog(inner: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(inner))
    listener.listen(0)
    full = closing(ttrpc.connect(str(inner)))
    with listener, full, pytest.raises(BlockingIOError, match=str(inner)):
        ttrpc.connect(str(inner), timeout=0.05)


def test_no_thread_is_left_behind(pair: tuple[ttrpc.Client, RawServer]) -> None:
    client, _ = pair
    client.close()
    assert "ttrpc client" not in [thread.name for thread in threading.enumerate()]
