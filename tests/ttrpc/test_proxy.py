"""The proxy between real sockets: what passes, what is answered, and what must disturb nobody."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim import ttrpc
from shim.ttrpc import proxy as proxy_module
from shim.ttrpc.connection import ServerConnection, response
from shim.ttrpc.events import RequestReceived, ResponseReceived
from shim.ttrpc.frames import DATA, MAX_DATA, REMOTE_CLOSED, REQUEST, RESPONSE, frame
from shim.ttrpc.messages import Request
from tests.ttrpc.peers import (
    TIMEOUT,
    RawPeer,
    as_nobody,
    dial,
    listen,
    proxying,
    running,
    serving,
    until,
)


def echo(call: ttrpc.Call) -> bytes:
    return b"inner " + call.payload


def parrot(call: ttrpc.Call, stream: ttrpc.ServerStream) -> None:
    for message in stream:
        stream.send(message)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def server(inner: Path, gate: threading.Event) -> Iterator[ttrpc.Server]:
    def wait(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        return b"inner waited"

    def big(call: ttrpc.Call) -> bytes:
        return bytes(int(call.payload))

    handlers = {
        "svc": {
            "Echo": echo,
            "Pause": echo,
            "Wait": wait,
            "Big": big,
            "Parrot": ttrpc.Streaming(parrot),
        }
    }
    with serving(inner, handlers) as running_server:
        yield running_server


def error_of(event: object) -> tuple[int, int]:
    """The stream and the code of a response that is an error."""
    assert isinstance(event, ResponseReceived)
    assert event.error is not None, event
    return event.stream_id, event.error.code


# Passing through


def test_calls_pass_through(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    with proxying(outer, inner), ttrpc.Client(dial(outer)) as client:
        assert client.call("svc", "Echo", b"x", timeout=TIMEOUT) == b"inner x"
        with pytest.raises(ttrpc.StatusError, match="method Nope") as caught:
            client.call("svc", "Nope")
        assert caught.value.code == ttrpc.UNIMPLEMENTED


def test_answers_pass_out_of_order(
    server: ttrpc.Server, inner: Path, outer: Path, gate: threading.Event
) -> None:
    with proxying(outer, inner), RawPeer(dial(outer)) as peer:
        slow, quick = peer.request("Wait"), peer.request("Echo", b"x")
        assert peer.event() == ResponseReceived(quick, b"inner x")
        gate.set()
        assert peer.event() == ResponseReceived(slow, b"inner waited")


def test_streams_pass_through(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    with proxying(outer, inner), ttrpc.Client(dial(outer)) as client:
        stream = client.stream("svc", "Parrot", sending=True, timeout=TIMEOUT)
        for message in (b"a", b"", b"c"):
            stream.send(message)
            assert stream.recv() == message
        stream.close_send()
        assert stream.recv() is None


def test_frames_of_any_size_pass_whole(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    with proxying(outer, inner), ttrpc.Client(dial(outer)) as client:
        for size in (1, 65_536, 1 << 20, MAX_DATA - 100):
            payload = random.Random(size).randbytes(size)
            assert client.call("svc", "Echo", payload, timeout=TIMEOUT)[6:] == payload


def test_unknown_kinds_of_frames_pass_and_are_ignored(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    with proxying(outer, inner), RawPeer(dial(outer)) as peer:
        peer.sock.sendall(frame(1, 99, 3, b"from the future") + frame(3, RESPONSE))
        peer.request("Echo", b"x")
        assert peer.event() == ResponseReceived(1, b"inner x")


def test_many_connections_with_many_calls_each(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    connections, threads, calls = 40, 3, 20

    def handle(call: ttrpc.Call) -> bytes:
        return b"outer " + call.payload

    def use(client: ttrpc.Client, label: int) -> None:
        for n in range(calls):
            payload = f"{label}/{n}".encode() * (1 + n * 100)
            method, prefix = ("Pause", b"outer ") if n % 4 == 0 else ("Echo", b"inner ")
            assert client.call("svc", method, payload, timeout=TIMEOUT) == prefix + payload

    with proxying(outer, inner, {"Pause": handle}) as proxy:
        clients = [ttrpc.Client(dial(outer)) for _ in range(connections)]
        with ThreadPoolExecutor(connections * threads) as pool:
            used = [
                pool.submit(use, client, label)
                for label, client in enumerate(clients)
                for _ in range(threads)
            ]
            for each in used:
                each.result()
        assert len(proxy._sessions) == connections
        for client in clients:
            client.close()
        until(lambda: not proxy._sessions and not proxy._ends)


# Intercepting


def test_a_handler_answers_instead_of_the_inner(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    def handle(call: ttrpc.Call) -> bytes:
        return f"{call.timeout} {call.metadata} {call.payload!r} {call.connection}".encode()

    with proxying(outer, inner, {"Pause": handle}), ttrpc.Client(dial(outer)) as client:
        answer = client.call("svc", "Pause", b"p", timeout=8.0, metadata={"k": "v"})
        assert answer == b"8.0 {'k': 'v'} b'p' 1"
        assert client.call("svc", "Echo", b"x") == b"inner x"


def test_while_handlers_run_everything_else_is_answered(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    gates = {b"first": threading.Event(), b"second": threading.Event()}

    def handle(call: ttrpc.Call) -> bytes:
        gates[call.payload].wait(TIMEOUT)
        return b"outer " + call.payload

    with proxying(outer, inner, {"Pause": handle}), RawPeer(dial(outer)) as peer:
        first, second = peer.request("Pause", b"first"), peer.request("Pause", b"second")
        for _ in range(5):
            stream_id = peer.request("Echo", b"x")
            assert peer.event() == ResponseReceived(stream_id, b"inner x")
        gates[b"second"].set()
        assert peer.event() == ResponseReceived(second, b"outer second")
        gates[b"first"].set()
        assert peer.event() == ResponseReceived(first, b"outer first")


def test_what_a_handler_raises_becomes_a_status(
    server: ttrpc.Server, inner: Path, outer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(call: ttrpc.Call) -> bytes:
        raise ttrpc.StatusError(ttrpc.FAILED_PRECONDITION, "not now")

    def break_down(call: ttrpc.Call) -> bytes:
        raise KeyError

    def leave(call: ttrpc.Call) -> bytes:
        raise SystemExit(3)

    def wrong(call: ttrpc.Call) -> Any:
        return "text"

    def nonsense(call: ttrpc.Call) -> bytes:
        raise ttrpc.StatusError("five", 5)  # type: ignore[arg-type]

    handlers = {
        "Refuse": refuse,
        "BreakDown": break_down,
        "Leave": leave,
        "Wrong": wrong,
        "Endless": lambda call: bytes(MAX_DATA),
    }
    with proxying(outer, inner, handlers), ttrpc.Client(dial(outer)) as client:
        seen = {}
        for method in handlers:
            with pytest.raises(ttrpc.StatusError) as caught:
                client.call("svc", method, timeout=TIMEOUT)
            seen[method] = (caught.value.code, caught.value.message)
        assert client.call("svc", "Echo", b"x") == b"inner x"
    assert seen == {
        "Refuse": (ttrpc.FAILED_PRECONDITION, "not now"),
        "BreakDown": (ttrpc.UNKNOWN, "KeyError"),
        "Leave": (ttrpc.UNKNOWN, "3"),
        "Wrong": (ttrpc.UNKNOWN, "the handler of Wrong returned a str"),
        "Endless": (
            ttrpc.RESOURCE_EXHAUSTED,
            "message length 4194309 exceeds the maximum message size of 4194304",
        ),
    }
    shown = capfd.readouterr().err
    assert "KeyError" in shown
    assert "StatusError" not in shown


def test_a_routing_table_that_fails_costs_one_call(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    def handler_for(service: str, method: str) -> None:
        if method == "Pause":
            raise LookupError("no table")

    proxy = ttrpc.Proxy(listen(outer), lambda: dial(inner), handler_for)
    with running(proxy), ttrpc.Client(dial(outer)) as client:
        with pytest.raises(ttrpc.StatusError, match="no table"):
            client.call("svc", "Pause")
        assert client.call("svc", "Echo", b"x") == b"inner x"


def test_more_handlers_at_once_than_is_sane_are_refused(
    server: ttrpc.Server,
    inner: Path,
    outer: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy_module, "_MAX_CALLS", 2)

    def handle(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        return b""

    with proxying(outer, inner, {"Pause": handle}), RawPeer(dial(outer)) as peer:
        for _ in range(3):
            peer.request("Pause")
        assert error_of(peer.event()) == (5, ttrpc.RESOURCE_EXHAUSTED)
        assert peer.request("Echo", b"x") == 7
        assert peer.event() == ResponseReceived(7, b"inner x")
        gate.set()
        assert {peer.event().stream_id, peer.event().stream_id} == {1, 3}


def test_an_answer_for_a_caller_that_left_is_dropped(
    server: ttrpc.Server, inner: Path, outer: Path, gate: threading.Event
) -> None:
    closed: list[int] = []
    finished: list[int] = []

    def handle(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        finished.append(call.connection)
        return b"too late"

    with proxying(outer, inner, {"Pause": handle}, closed.append) as proxy:
        with RawPeer(dial(outer)) as peer:
            peer.request("Pause")
            until(lambda: any(session.calls for session in list(proxy._sessions.values())))
        until(lambda: closed == [1])
        gate.set()
        until(lambda: finished == [1] and not proxy._finished)
        with ttrpc.Client(dial(outer)) as client:
            assert client.call("svc", "Echo", b"x") == b"inner x"
    assert closed == [1, 2]


# Sending on what a handler does not want


def test_forward_sends_the_request_on(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    def handle(call: ttrpc.Call) -> Any:
        return ttrpc.FORWARD

    with proxying(outer, inner, {"Pause": handle}), ttrpc.Client(dial(outer)) as client:
        for n in range(5):
            payload = str(n).encode()
            assert client.call("svc", "Pause", payload, timeout=TIMEOUT) == b"inner " + payload


def test_forward_works_when_later_calls_have_already_passed(
    server: ttrpc.Server, inner: Path, outer: Path, gate: threading.Event
) -> None:
    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    handlers = {"Pause": handle, "Nope": handle}
    with proxying(outer, inner, handlers) as proxy, RawPeer(dial(outer)) as peer:
        early, unknown = peer.request("Pause", b"early"), peer.request("Nope")
        later = peer.request("Echo", b"later")
        assert peer.event() == ResponseReceived(later, b"inner later")
        gate.set()  # the ids are now too low for the twin
        answers = {event.stream_id: event for event in (peer.event(), peer.event())}
        assert answers[early] == ResponseReceived(early, b"inner early")
        assert error_of(answers[unknown]) == (unknown, ttrpc.UNIMPLEMENTED)
        until(lambda: len(proxy._ends) == 2)
        last = peer.request("Echo", b"last")
        assert peer.event() == ResponseReceived(last, b"inner last")


class RawInner:
    """An inner server that does what the test says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = listen(path)
        self.listener.settimeout(TIMEOUT)

    def accept(self) -> socket.socket:
        sock, _ = self.listener.accept()
        sock.settimeout(TIMEOUT)
        return sock

    def __enter__(self) -> RawInner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.listener.close()


def receive(sock: socket.socket) -> RequestReceived:
    core = ServerConnection()
    while True:
        data = sock.recv(1 << 16)
        assert data
        for event in core.receive(data):
            assert isinstance(event, RequestReceived)
            return event


def test_a_late_forward_whose_connection_dies_is_answered(
    inner: Path, outer: Path, gate: threading.Event
) -> None:
    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    with (
        RawInner(inner) as raw,
        proxying(outer, inner, {"Pause": handle}),
        RawPeer(dial(outer)) as peer,
        raw.accept() as twin,
    ):
        late = peer.request("Pause")
        peer.request("Echo")
        assert receive(twin).method == "Echo"
        gate.set()
        with raw.accept() as own:
            assert receive(own).stream_id == late
        assert error_of(peer.event()) == (late, ttrpc.UNAVAILABLE)
        twin.sendall(response(3, b"still here"))
        assert peer.event() == ResponseReceived(3, b"still here")


def test_a_late_forward_ends_with_its_caller(
    inner: Path, outer: Path, gate: threading.Event
) -> None:
    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    with RawInner(inner) as raw, proxying(outer, inner, {"Pause": handle}):
        with RawPeer(dial(outer)) as peer, raw.accept() as twin:
            peer.request("Pause")
            peer.request("Echo")
            assert receive(twin).method == "Echo"
            gate.set()
            own = raw.accept()
            receive(own)
        assert own.recv(1) == b""
        own.close()


def test_a_late_forward_that_cannot_connect_is_answered(
    inner: Path, outer: Path, gate: threading.Event
) -> None:
    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    with (
        RawInner(inner) as raw,
        proxying(outer, inner, {"Pause": handle}),
        RawPeer(dial(outer)) as peer,
        raw.accept() as twin,
    ):
        late = peer.request("Pause")
        peer.request("Echo")
        assert receive(twin).method == "Echo"
        inner.unlink()
        gate.set()
        assert error_of(peer.event()) == (late, ttrpc.UNAVAILABLE)


def test_whatever_handlers_decide_and_when_each_call_is_answered_once(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    calls, connections = 60, 8
    prefixes = {b"forward": b"inner ", b"answer": b"outer ", b"raise": b""}

    def handle(call: ttrpc.Call) -> Any:
        what, _, delay = call.payload.split(b"/")
        time.sleep(float(delay))  # the handler's work, of which some is longer
        if what == b"forward":
            return ttrpc.FORWARD
        if what == b"raise":
            raise ttrpc.StatusError(ttrpc.ABORTED, "as told")
        return b"outer " + call.payload

    def use(seed: int) -> None:
        chance = random.Random(seed)
        with RawPeer(dial(outer)) as peer:
            expected = {}
            for n in range(calls):
                what = chance.choice(list(prefixes))
                payload = b"%s/%d/%f" % (what, n, chance.random() / 100)
                method = chance.choice(["Pause", "Echo"])
                prefix = prefixes[what] if method == "Pause" else b"inner "
                expected[peer.request(method, payload)] = prefix + payload if prefix else None
            for _ in range(calls):
                event = peer.event()
                assert isinstance(event, ResponseReceived)
                wanted = expected.pop(event.stream_id)
                if wanted is None:
                    assert error_of(event)[1] == ttrpc.ABORTED
                else:
                    assert (event.payload, event.error) == (wanted, None)
            assert not expected

    with proxying(outer, inner, {"Pause": handle}) as proxy:
        with ThreadPoolExecutor(connections) as pool:
            for done in [pool.submit(use, seed) for seed in range(connections)]:
                done.result()
        until(lambda: not proxy._sessions and not proxy._ends)


# Rules of the protocol that the proxy must keep itself


@pytest.mark.parametrize("method", ["Pause", "Echo"])
def test_ids_must_be_odd_and_grow_whoever_answers(
    method: str, server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    data = Request(service="svc", method=method, payload=b"x").encode()
    with proxying(outer, inner, {"Pause": lambda call: b"inner x"}), RawPeer(dial(outer)) as peer:
        codes = []
        for stream_id in (5, 8, 5, 3, 7):
            peer.sock.sendall(frame(stream_id, REQUEST, 0, data))
            answer = ttrpc.ClientConnection()
            answer._next_id = stream_id
            answer.request("svc", method)
            (event,) = answer.receive(peer.frame().raw)
            assert isinstance(event, ResponseReceived)
            codes.append(event.error.code if event.error else 0)
    refused = ttrpc.INVALID_ARGUMENT
    assert codes == [0, refused, refused, refused, 0]


def test_an_oversize_request_is_refused_and_the_connection_stays(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    with proxying(outer, inner), RawPeer(dial(outer)) as peer:
        stream_id, _ = peer.core.request("svc", "Echo")
        length = MAX_DATA + 1
        peer.sock.sendall(struct.pack(">IIBB", length, stream_id, REQUEST, 0) + bytes(length))
        assert error_of(peer.event()) == (stream_id, ttrpc.RESOURCE_EXHAUSTED)
        stream_id = peer.request("Echo", b"x")
        assert peer.event() == ResponseReceived(stream_id, b"inner x")


def test_an_oversize_answer_fails_its_call_and_the_connection_stays(
    inner: Path, outer: Path
) -> None:
    with (
        RawInner(inner) as raw,
        proxying(outer, inner),
        RawPeer(dial(outer)) as peer,
        raw.accept() as twin,
    ):
        stream_id = peer.request("Echo")
        receive(twin)
        length = MAX_DATA + 1
        twin.sendall(struct.pack(">IIBB", length, stream_id, RESPONSE, 0) + bytes(length))
        assert error_of(peer.event()) == (stream_id, ttrpc.RESOURCE_EXHAUSTED)
        stream_id = peer.request("Echo")
        twin.sendall(response(stream_id, b"fine"))
        assert peer.event() == ResponseReceived(stream_id, b"fine")


def test_a_request_that_is_no_message_is_refused(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    broken_metadata = Request(service="svc", method="Pause").encode() + b"\x2a\x03\x0a\x01\xff"
    with proxying(outer, inner, {"Pause": echo}), RawPeer(dial(outer)) as peer:
        for data in (b"\xff\xff", broken_metadata):
            stream_id, _ = peer.core.request("svc", "Echo")
            peer.sock.sendall(frame(stream_id, REQUEST, 0, data))
            assert error_of(peer.event()) == (stream_id, ttrpc.INVALID_ARGUMENT)


# Ends


def test_an_outer_that_leaves_takes_its_twin_along(inner: Path, outer: Path) -> None:
    closed: list[int] = []
    with RawInner(inner) as raw, proxying(outer, inner, on_close=closed.append):
        first, second = RawPeer(dial(outer)), RawPeer(dial(outer))
        twin, other = raw.accept(), raw.accept()
        with first:
            first.request("Echo")
            receive(twin)
        assert twin.recv(1) == b""
        until(lambda: closed == [1])
        with second:
            second.request("Echo")
            receive(other)
        twin.close()
        other.close()
    until(lambda: closed == [1, 2])


def test_an_inner_that_leaves_takes_its_outer_along_after_its_last_words(
    inner: Path, outer: Path
) -> None:
    size = 2 << 20
    with RawInner(inner) as raw, proxying(outer, inner), RawPeer(dial(outer)) as peer:
        stream_id = peer.request("Echo")
        with raw.accept() as twin:
            receive(twin)
            twin.sendall(response(stream_id, bytes(size)))
        assert peer.event() == ResponseReceived(stream_id, bytes(size))
        assert peer.at_end()


def test_without_an_inner_an_outer_is_closed_at_once(inner: Path, outer: Path) -> None:
    with proxying(outer, inner), RawPeer(dial(outer)) as peer:
        assert peer.at_end()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_shown_the_door(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    def knock() -> None:
        with RawPeer(dial(outer)) as peer:
            assert peer.at_end()

    with proxying(outer, inner):
        outer.parent.chmod(0o755)
        outer.chmod(0o777)
        as_nobody(knock)
        with ttrpc.Client(dial(outer)) as client:
            assert client.call("svc", "Echo", b"x") == b"inner x"


# Peers that do not behave


def test_an_outer_that_does_not_read_is_not_read_for_and_loses_nothing(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    size, calls = 300_000, 60
    with proxying(outer, inner) as proxy, RawPeer(dial(outer)) as lazy:
        for _ in range(calls):
            lazy.request("Big", str(size).encode())
        until(lambda: any(not end.mask & proxy_module._IN for end in list(proxy._ends.values())))
        (session,) = proxy._sessions.values()
        assert session.outer.waiting < proxy_module._MAX_WAITING + size + (1 << 17)
        with ttrpc.Client(dial(outer)) as client:
            assert client.call("svc", "Echo", b"x", timeout=TIMEOUT) == b"inner x"
        got = [lazy.event() for _ in range(calls)]
        assert sorted(event.stream_id for event in got) == list(range(1, 2 * calls, 2))
        assert all(isinstance(e, ResponseReceived) and e.payload == bytes(size) for e in got)


def test_an_inner_that_does_not_read_stops_its_outer_only(inner: Path, outer: Path) -> None:
    payload = bytes(400_000)
    calls = 20
    with (
        RawInner(inner) as raw,
        proxying(outer, inner) as proxy,
        RawPeer(dial(outer)) as peer,
        raw.accept() as twin,
    ):
        core = ttrpc.ClientConnection()
        data = b"".join(core.request("svc", "Echo", payload)[1] for _ in range(calls))
        sender = threading.Thread(target=peer.sock.sendall, args=(data,))
        sender.start()
        (session,) = proxy._sessions.values()
        until(lambda: not session.outer.mask & proxy_module._IN)
        assert session.twin.waiting < proxy_module._MAX_WAITING + len(payload) + (1 << 17)
        with RawPeer(dial(outer)) as other, raw.accept() as other_twin:
            stream_id = other.request("Echo")
            receive(other_twin)
            other_twin.sendall(response(stream_id, b"fine"))
            assert other.event() == ResponseReceived(stream_id, b"fine")
        server_core, got = ServerConnection(), 0
        while got < calls:
            got += len(server_core.receive(twin.recv(1 << 16)))
        sender.join(TIMEOUT)


def test_a_peer_that_asks_nonsense_and_reads_nothing_is_not_served_without_end(
    inner: Path, outer: Path
) -> None:
    nonsense = frame(2, REQUEST) * 1000
    with (
        RawInner(inner) as raw,
        proxying(outer, inner) as proxy,
        RawPeer(dial(outer)) as peer,
        raw.accept(),
    ):
        peer.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            while True:
                peer.sock.sendall(nonsense)
        (session,) = proxy._sessions.values()
        assert session.outer.waiting < 4 << 20


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.binary(max_size=60)
        | st.builds(
            frame,
            st.integers(0, 12),
            st.integers(0, 4),
            st.integers(0, 7),
            st.just(Request(service="svc", method="Echo").encode())
            | st.just(Request(service="svc", method="Pause").encode())
            | st.binary(max_size=20),
        ),
        max_size=12,
    )
)
def test_a_peer_that_sends_garbage_disturbs_nobody(
    garbled: tuple[ttrpc.Client, Path], garbage: list[bytes]
) -> None:
    client, outer = garbled
    with RawPeer(dial(outer)) as peer:
        try:
            for piece in garbage:
                peer.sock.sendall(piece)
        except OSError:
            pass
        assert client.call("svc", "Echo", b"x", timeout=TIMEOUT) == b"inner x"
    with ttrpc.Client(dial(outer)) as another:
        assert another.call("svc", "Pause", b"", timeout=TIMEOUT) == b"outer"


@pytest.fixture
def garbled(server: ttrpc.Server, inner: Path, outer: Path) -> Iterator[tuple[ttrpc.Client, Path]]:
    with (
        proxying(outer, inner, {"Pause": lambda call: b"outer"}),
        ttrpc.Client(dial(outer)) as client,
    ):
        yield client, outer


def test_a_mistake_in_the_loop_costs_one_connection(
    server: ttrpc.Server, inner: Path, outer: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with proxying(outer, inner) as proxy, ttrpc.Client(dial(outer)) as client:
        assert client.call("svc", "Echo", b"x") == b"inner x"
        with RawPeer(dial(outer)) as victim:
            until(lambda: 2 in proxy._sessions)
            proxy._sessions[2].outer.reader = None  # type: ignore[assignment]
            victim.request("Echo")
            assert victim.at_end()
        assert client.call("svc", "Echo", b"x") == b"inner x"
    assert "AttributeError" in capfd.readouterr().err


def test_out_of_descriptors_is_survived(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    with proxying(outer, inner) as proxy, ttrpc.Client(dial(outer)) as client:
        assert client.call("svc", "Echo", b"x") == b"inner x"
        waiting = socket.socket(socket.AF_UNIX)
        held: list[int] = []
        try:
            while True:
                held.append(os.dup(0))
        except OSError:
            pass
        waiting.connect(str(outer))
        until(lambda: proxy._accept_again is not None)
        assert client.call("svc", "Echo", b"x") == b"inner x"
        for fd in held:
            os.close(fd)
        with ttrpc.Client(waiting) as late:
            assert late.call("svc", "Echo", b"x", timeout=TIMEOUT) == b"inner x"


def test_descriptors_are_given_back(server: ttrpc.Server, inner: Path, outer: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with proxying(outer, inner, {"Pause": lambda call: b""}):
            for _ in range(10):
                with ttrpc.Client(dial(outer)) as client:
                    client.call("svc", "Echo", b"x")
                    client.call("svc", "Pause", b"x")
        outer.unlink()
    until(lambda: len(os.listdir("/proc/self/fd")) <= before)


# Stopping


def test_stop_lets_a_handler_finish_its_answer(
    server: ttrpc.Server, inner: Path, outer: Path, gate: threading.Event
) -> None:
    closed: list[int] = []

    def handle(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        return b"finished"

    handlers = {"Pause": handle}
    proxy = ttrpc.Proxy(
        listen(outer), lambda: dial(inner), lambda _, method: handlers.get(method), closed.append
    )
    thread = threading.Thread(target=proxy.run)
    thread.start()
    with RawPeer(dial(outer)) as peer, RawPeer(dial(outer)) as idle:
        stream_id = peer.request("Pause")
        until(lambda: any(session.calls for session in list(proxy._sessions.values())))
        proxy.stop()
        gate.set()
        assert peer.event() == ResponseReceived(stream_id, b"finished")
        assert peer.at_end()
        assert idle.at_end()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        with pytest.raises(ConnectionRefusedError):
            dial(outer)
        until(lambda: sorted(closed) == [1, 2])
    proxy.stop()


def test_stop_does_not_wait_for_ever(
    server: ttrpc.Server,
    inner: Path,
    outer: Path,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(proxy_module, "_GRACE", 0.05)
    answered = threading.Event()

    def handle(call: ttrpc.Call) -> bytes:
        gate.wait(TIMEOUT)
        answered.set()
        return b"too late"

    handlers = {"Pause": handle}
    proxy = ttrpc.Proxy(listen(outer), lambda: dial(inner), lambda _, m: handlers.get(m))
    thread = threading.Thread(target=proxy.run)
    thread.start()
    with RawPeer(dial(outer)) as peer:
        peer.request("Pause")
        until(lambda: any(session.calls for session in list(proxy._sessions.values())))
        proxy.stop()
        assert peer.at_end()
        thread.join(TIMEOUT)
        assert not thread.is_alive()
        gate.set()
        assert answered.wait(TIMEOUT)


def test_stop_may_be_called_by_a_signal_handler_on_the_loops_own_thread(
    server: ttrpc.Server, inner: Path, outer: Path
) -> None:
    program = textwrap.dedent("""
        import signal, socket, sys
        from shim import ttrpc
        inner, outer = sys.argv[1:]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(outer)
        listener.listen()
        proxy = ttrpc.Proxy(listener, lambda: ttrpc.connect(inner), lambda service, method: None)
        signal.signal(signal.SIGTERM, lambda number, frame: proxy.stop())
        print("ready", flush=True)
        proxy.run()
        print("done", flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program, str(inner), str(outer)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        with ttrpc.Client(dial(outer)) as client:
            assert client.call("svc", "Echo", b"x") == b"inner x"
            child.send_signal(signal.SIGTERM)
            assert client.wait_closed(TIMEOUT)
        assert child.stdout.readline() == "done\n"
    assert child.returncode == 0


def test_a_frame_that_ends_a_data_stream_ends_a_late_forward(
    inner: Path, outer: Path, gate: threading.Event
) -> None:
    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    with (
        RawInner(inner) as raw,
        proxying(outer, inner, {"Pause": handle}),
        RawPeer(dial(outer)) as peer,
        raw.accept() as twin,
    ):
        late = peer.request("Pause", flags=REMOTE_CLOSED)
        peer.request("Echo")
        receive(twin)
        gate.set()
        with raw.accept() as own:
            receive(own)
            own.sendall(frame(late, DATA, 0, b"1"))
            assert peer.frame().data == b"1"
            own.sendall(frame(late, DATA, REMOTE_CLOSED, b"2"))
            assert peer.frame().data == b"2"
            assert own.recv(1) == b""
