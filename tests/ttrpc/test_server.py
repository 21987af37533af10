"""The server, over real sockets."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim import ttrpc
from shim.ttrpc import server as server_module
from shim.ttrpc.events import ResponseReceived
from shim.ttrpc.frames import MAX_DATA, REMOTE_OPEN, REQUEST, frame
from tests.ttrpc.peers import TIMEOUT, RawPeer, as_nobody, dial, listen, serving, until


def echo(call: ttrpc.Call) -> bytes:
    return call.payload


def repeat(call: ttrpc.Call, stream: ttrpc.ServerStream) -> None:
    for n in range(int(call.payload)):
        stream.send(str(n).encode())


def add(call: ttrpc.Call, stream: ttrpc.ServerStream) -> bytes:
    return b"+".join(stream)


def parrot(call: ttrpc.Call, stream: ttrpc.ServerStream) -> None:
    for message in stream:
        stream.send(message * 2)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def server(inner: Path, gate: threading.Event) -> Iterator[ttrpc.Server]:
    def wait(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        return b"waited"

    def describe(call: ttrpc.Call) -> bytes:
        return f"{call.timeout} {call.metadata} {call.connection} {call!r}".encode()

    def break_down(call: ttrpc.Call) -> bytes:
        raise ZeroDivisionError("division by zero")

    def endless(call: ttrpc.Call) -> bytes:
        return bytes(MAX_DATA)

    handlers = {
        "svc": {
            "Echo": echo,
            "Wait": wait,
            "Describe": describe,
            "BreakDown": break_down,
            "Endless": endless,
            "Repeat": ttrpc.Streaming(repeat),
            "Add": ttrpc.Streaming(add),
            "Parrot": ttrpc.Streaming(parrot),
        }
    }
    with serving(inner, handlers) as running_server:
        yield running_server


@pytest.fixture
def client(server: ttrpc.Server, inner: Path) -> Iterator[ttrpc.Client]:
    with ttrpc.Client(dial(inner)) as connected:
        yield connected


def test_a_call_is_answered(client: ttrpc.Client) -> None:
    assert client.call("svc", "Echo", b"hello") == b"hello"
    assert client.call("svc", "Echo", b"") == b""


def test_a_handler_sees_deadline_and_metadata(client: ttrpc.Client) -> None:
    answer = client.call("svc", "Describe", timeout=7.0, metadata={"namespace": "k8s.io"})
    assert answer == b"7.0 {'namespace': 'k8s.io'} 1 <Call svc/Describe on connection 1>"


def test_a_slow_call_holds_up_nothing(client: ttrpc.Client, gate: threading.Event) -> None:
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.call, "svc", "Wait")
        assert client.call("svc", "Echo", b"meanwhile", timeout=TIMEOUT) == b"meanwhile"
        gate.set()
        assert slow.result() == b"waited"


@pytest.mark.parametrize(
    ("service", "method", "text"),
    [("other", "Echo", "service other"), ("svc", "Nope", "method Nope")],
)
def test_unknown_services_and_methods_are_worded_as_gos(
    client: ttrpc.Client, service: str, method: str, text: str
) -> None:
    with pytest.raises(ttrpc.StatusError) as caught:
        client.call(service, method)
    assert (caught.value.code, caught.value.message) == (ttrpc.UNIMPLEMENTED, text)


def test_an_exception_becomes_a_status_and_is_shown(
    client: ttrpc.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ttrpc.StatusError) as caught:
        client.call("svc", "BreakDown")
    assert (caught.value.code, caught.value.message) == (ttrpc.UNKNOWN, "division by zero")
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert client.call("svc", "Echo", b"still here") == b"still here"


def test_an_answer_that_is_too_long_becomes_a_status(client: ttrpc.Client) -> None:
    with pytest.raises(ttrpc.StatusError) as caught:
        client.call("svc", "Endless")
    assert caught.value.code == ttrpc.RESOURCE_EXHAUSTED


def test_an_oversize_frame_is_answered_and_the_connection_stays(
    server: ttrpc.Server, inner: Path
) -> None:
    with RawPeer(dial(inner)) as peer:
        first, _ = peer.core.request("svc", "Echo")
        length = MAX_DATA + 7
        peer.sock.sendall(struct.pack(">IIBB", length, first, REQUEST, 0) + bytes(length))
        event = peer.event()
        assert isinstance(event, ResponseReceived)
        assert event.error is not None
        assert event.error.code == ttrpc.RESOURCE_EXHAUSTED
        second = peer.request("Echo", b"fine")
        assert peer.event() == ResponseReceived(second, b"fine")


def test_a_frame_cut_off_by_the_end_of_the_connection_harms_nobody(
    server: ttrpc.Server, inner: Path, client: ttrpc.Client
) -> None:
    with RawPeer(dial(inner)) as peer:
        peer.sock.sendall(frame(1, REQUEST, 0, b"whole")[:-2])
        peer.sock.shutdown(socket.SHUT_WR)
        assert peer.at_end()
    assert client.call("svc", "Echo", b"x") == b"x"


def test_more_calls_at_once_than_is_sane_are_refused(
    server: ttrpc.Server, inner: Path, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    monkeypatch.setattr(server_module, "_MAX_CALLS", 2)
    with RawPeer(dial(inner)) as peer:
        asked = [peer.core.request("svc", "Wait")[1] for _ in range(3)]
        peer.sock.sendall(b"".join(asked))
        refused = peer.event()
        assert isinstance(refused, ResponseReceived)
        assert refused.error is not None
        assert (refused.stream_id, refused.error.code) == (5, ttrpc.RESOURCE_EXHAUSTED)
        gate.set()
        assert {peer.event().stream_id, peer.event().stream_id} == {1, 3}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_shown_the_door(server: ttrpc.Server, inner: Path) -> None:
    inner.parent.chmod(0o755)
    inner.chmod(0o777)

    def knock() -> None:
        with RawPeer(dial(inner)) as peer:
            assert peer.at_end()

    as_nobody(knock)
    with RawPeer(dial(inner)) as peer:
        peer.request("Echo", b"welcome")
        assert peer.event() == ResponseReceived(1, b"welcome")


# Streams


def test_a_stream_of_answers(client: ttrpc.Client) -> None:
    assert list(client.stream("svc", "Repeat", b"3")) == [b"0", b"1", b"2"]


def test_a_stream_of_messages_with_one_answer(client: ttrpc.Client) -> None:
    stream = client.stream("svc", "Add", sending=True)
    for message in (b"1", b"2", b"3"):
        stream.send(message)
    stream.close_send()
    assert stream.response() == b"1+2+3"
    assert stream.recv() is None
    with pytest.raises(ttrpc.StreamClosed):
        stream.send(b"late")


def test_streams_both_ways_at_once(client: ttrpc.Client) -> None:
    stream = client.stream("svc", "Parrot", sending=True, timeout=TIMEOUT)
    for message in (b"a", b"b"):
        stream.send(message)
        assert stream.recv() == message * 2
    stream.close_send()
    assert stream.recv() is None


def test_a_streams_deadline_counts_too(client: ttrpc.Client) -> None:
    stream = client.stream("svc", "Parrot", sending=True, timeout=0.05)
    with pytest.raises(ttrpc.StatusError) as caught:
        stream.recv()
    assert caught.value.code == ttrpc.DEADLINE_EXCEEDED


def test_a_handler_whose_caller_went_away_is_told(inner: Path) -> None:
    told: list[Exception] = []

    def listen_on(call: ttrpc.Call, stream: ttrpc.ServerStream) -> None:
        try:
            stream.recv()
        except ttrpc.ConnectionClosed as error:
            told.append(error)
            raise

    with serving(inner, {"svc": {"Listen": ttrpc.Streaming(listen_on)}}):
        with RawPeer(dial(inner)) as peer:
            peer.request("Listen", flags=REMOTE_OPEN)
        until(lambda: len(told) == 1)


def test_a_handler_that_does_not_take_its_messages_loses_its_stream_only(
    inner: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_BACKLOG_WAIT", 0.01)

    def ignore(call: ttrpc.Call, stream: ttrpc.ServerStream) -> None:
        gate.wait(TIMEOUT)

    handlers = {"svc": {"Ignore": ttrpc.Streaming(ignore), "Echo": echo}}
    with serving(inner, handlers), RawPeer(dial(inner)) as peer:
        stream_id = peer.request("Ignore", flags=REMOTE_OPEN)
        for _ in range(65):
            peer.sock.sendall(peer.core.send_data(stream_id, b"x"))
        event = peer.event()
        assert isinstance(event, ResponseReceived)
        assert event.error is not None
        assert (event.stream_id, event.error.code) == (stream_id, ttrpc.INVALID_ARGUMENT)
        other = peer.request("Echo", b"fine")
        assert peer.event() == ResponseReceived(other, b"fine")


# Stopping


def test_stop_lets_a_call_under_way_finish(inner: Path, gate: threading.Event) -> None:
    started = threading.Event()

    def wait(call: ttrpc.Call) -> bytes:
        started.set()
        gate.wait(TIMEOUT)
        return b"finished"

    server = ttrpc.Server(listen(inner), {"svc": {"Wait": wait}})
    thread = threading.Thread(target=server.run)
    thread.start()
    with ttrpc.Client(dial(inner)) as client, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.call, "svc", "Wait")
        started.wait(TIMEOUT)
        stopping = threading.Thread(target=server.stop, args=(TIMEOUT,))
        stopping.start()
        thread.join(TIMEOUT)
        with pytest.raises(ConnectionRefusedError):
            ttrpc.connect(str(inner))
        stopping.join(0.2)
        assert stopping.is_alive()  # it waits for the call
        gate.set()
        assert answer.result() == b"finished"
        stopping.join(TIMEOUT)
        assert client.wait_closed(TIMEOUT)


def test_stop_does_not_wait_for_ever_nor_for_the_idle(inner: Path, gate: threading.Event) -> None:
    def wait(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        return b"too late"

    server = ttrpc.Server(listen(inner), {"svc": {"Wait": wait}})
    thread = threading.Thread(target=server.run)
    thread.start()
    with RawPeer(dial(inner)) as busy, RawPeer(dial(inner)) as idle:
        busy.request("Wait")
        until(lambda: any(c.busy for c in list(server._connections.values())))
        server.stop(grace=0.05)
        assert busy.at_end()
        assert idle.at_end()
    thread.join(TIMEOUT)
    assert not thread.is_alive()


def test_threads_and_descriptors_are_given_back(inner: Path) -> None:
    with serving(inner, {"svc": {"Echo": echo}}) as server:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with ttrpc.Client(dial(inner)) as client:
                client.call("svc", "Echo", b"x")
        until(lambda: not server._connections)
        until(lambda: len(os.listdir("/proc/self/fd")) <= before)
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("ttrpc")])
