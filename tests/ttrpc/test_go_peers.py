"""Our peers against Go's: the stock runc shims of Debian 12, 13 and forky (ttrpc 1.1, 1.2, 1.2).

The shim's server is what our client and proxy must get on with; its events come from a Go client,
which our server must get on with.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from shim import ttrpc
from shim.protowire import Message, bytes_, message, repeated, string, uint32
from shim.ttrpc.events import ResponseReceived
from shim.ttrpc.frames import MAX_DATA, REQUEST, frame
from shim.ttrpc.messages import Request
from tests.nodes import roots
from tests.nodes.node import Node, NodeError
from tests.ttrpc.peers import TIMEOUT, RawPeer, listen, proxying, running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a node needs root")

START = (
    "containerd-shim-runc-v2 -namespace go -id one -address /run/containerd/containerd.sock"
    " -publish-binary /bin/true start"
)
EVENTS = "containerd.services.events.ttrpc.v1.Events"


class TaskRequest(Message):
    """What Connect, State, Pids, Start and Delete take."""

    id: str = string(1)


class ConnectResponse(Message):
    shim_pid: int = uint32(1)
    task_pid: int = uint32(2)


class Mount(Message):
    type: str = string(1)
    source: str = string(2)
    target: str = string(3)
    options: list[str] = repeated(string(4))


class CreateTaskRequest(Message):
    id: str = string(1)
    bundle: str = string(2)
    rootfs: list[Mount] = repeated(message(3, Mount))


class Envelope(Message):
    namespace: str = string(2)
    topic: str = string(3)
    event: bytes = bytes_(4)


class ForwardRequest(Message):
    envelope: Envelope | None = message(1, Envelope)


class Shim:
    """A stock shim in a node, and the events it publishes to a server of ours."""

    def __init__(self, node: Node, address: str, topics: SimpleQueue[tuple[str, str]]) -> None:
        self.node = node
        self.path = node.path(address.removeprefix("unix://"))
        self.task = f"containerd.task.v{3 if node.name == 'forky' else 2}.Task"
        self.topics = topics

    @property
    def demands_growing_ids(self) -> bool:
        return self.node.name != "12"

    def connect(self) -> ttrpc.Client:
        return ttrpc.Client(ttrpc.connect(str(self.path)))


@pytest.fixture(scope="module", params=sorted(roots.RECIPES))
def shim(request: pytest.FixtureRequest) -> Iterator[Shim]:
    topics: SimpleQueue[tuple[str, str]] = SimpleQueue()

    def take(call: ttrpc.Call) -> bytes:
        envelope = ForwardRequest.decode(call.payload).envelope
        assert envelope is not None
        topics.put((envelope.namespace, envelope.topic))
        return b""

    with contextlib.ExitStack() as stack:
        try:
            node = stack.enter_context(Node(request.param))
        except (NodeError, OSError) as error:
            pytest.skip(f"no node {request.param}: {error}")
        events = ttrpc.Server(listen(node.path("/run/events")), {EVENTS: {"Forward": take}})
        stack.enter_context(running(events))
        stack.callback(os.close, prepare(node))
        # A shell in between, since start wants to know its parent's OOM score.
        script = f"{START}; exit $?"
        environment = {"TTRPC_ADDRESS": "/run/events"}
        said = node.run(["sh", "-c", script], cwd="/run/private", env=environment)
        answer = said.stdout.strip()
        address = json.loads(answer)["address"] if answer.startswith("{") else answer
        yield Shim(node, address, topics)


def prepare(node: Node) -> int:
    """A working directory for the shim's start; the log's descriptor, to be held while it runs."""
    private = node.path("/run/private")
    private.mkdir()
    (private / "config.json").write_text('{"annotations": {}}')
    os.mkfifo(private / "log")
    return os.open(private / "log", os.O_RDWR)


def asked(shim: Shim, method: str, identity: str = "none") -> bytes:
    """The data of a request frame."""
    payload = TaskRequest(id=identity).encode()
    return Request(service=shim.task, method=method, payload=payload).encode()


# Our client and a Go server


def test_a_call_and_its_answer(shim: Shim) -> None:
    with shim.connect() as client:
        answer = client.call(shim.task, "Connect", TaskRequest(id="one").encode(), timeout=TIMEOUT)
        (pid,) = shim.node.pids("containerd-shim-runc-v2")
        assert ConnectResponse.decode(answer).shim_pid == pid


def test_errors_come_with_gos_codes_and_words(shim: Shim) -> None:
    with shim.connect() as client:
        seen = []
        for service, method in [(shim.task, "State"), (shim.task, "Nope"), ("none", "State")]:
            with pytest.raises(ttrpc.StatusError) as caught:
                client.call(service, method, TaskRequest(id="x").encode(), timeout=TIMEOUT)
            seen.append((caught.value.code, caught.value.message))
    assert seen[0][0] == ttrpc.NOT_FOUND
    assert seen[1:] == [(ttrpc.UNIMPLEMENTED, "method Nope"), (ttrpc.UNIMPLEMENTED, "service none")]


def test_many_threads_share_one_connection(shim: Shim) -> None:
    payload = TaskRequest(id="one").encode()
    with shim.connect() as client, ThreadPoolExecutor(16) as pool:

        def connect(_: int) -> int:
            answer = client.call(shim.task, "Connect", payload, timeout=TIMEOUT)
            return ConnectResponse.decode(answer).shim_pid

        assert len(set(pool.map(connect, range(400)))) == 1


# The proxy between our client and a Go server


@pytest.fixture
def proxied(shim: Shim, outer: Path) -> Iterator[Path]:
    with proxying(outer, shim.path):
        yield outer


def test_calls_pass_through_the_proxy(shim: Shim, proxied: Path) -> None:
    with ttrpc.Client(ttrpc.connect(str(proxied))) as client:
        answer = client.call(shim.task, "Connect", TaskRequest(id="one").encode())
        assert ConnectResponse.decode(answer).shim_pid
        with pytest.raises(ttrpc.StatusError) as caught:
            client.call(shim.task, "Pids", TaskRequest(id="x").encode())
        assert caught.value.code == ttrpc.NOT_FOUND


def test_calls_answered_on_the_way_leave_gaps_that_go_accepts(shim: Shim, outer: Path) -> None:
    payload = TaskRequest(id="one").encode()
    handlers = {"Pause": lambda call: b"mine"}
    with (
        proxying(outer, shim.path, handlers),
        ttrpc.Client(ttrpc.connect(str(outer))) as client,
    ):
        for _ in range(10):
            assert client.call(shim.task, "Pause", payload, timeout=TIMEOUT) == b"mine"
            assert client.call(shim.task, "Connect", payload, timeout=TIMEOUT)


def test_a_late_forward_is_answered_by_go(shim: Shim, outer: Path) -> None:
    gate = threading.Event()

    def handle(call: ttrpc.Call) -> Any:
        gate.wait(TIMEOUT)
        return ttrpc.FORWARD

    with (
        proxying(outer, shim.path, {"State": handle}),
        RawPeer(ttrpc.connect(str(outer))) as peer,
    ):
        data = [asked(shim, "State"), asked(shim, "Connect", "one")]
        for stream_id, each in zip((1, 3), data, strict=True):
            peer.core.request(shim.task, "any")
            peer.sock.sendall(frame(stream_id, REQUEST, 0, each))
        first = peer.event()
        assert isinstance(first, ResponseReceived)
        assert (first.stream_id, first.error) == (3, None)
        gate.set()
        second = peer.event()
        assert isinstance(second, ResponseReceived)
        assert second.error is not None
        # "Not found", and not "ids must increment", which the low id would have met on the twin.
        assert (second.stream_id, second.error.code) == (1, ttrpc.NOT_FOUND)


def told(path: Path, raws: list[bytes], count: int) -> list[tuple[int, int]]:
    """The streams and codes of the answers to the frames, of which there must be so many."""
    answers: list[tuple[int, int]] = []
    with RawPeer(ttrpc.connect(str(path))) as peer:
        for raw in raws:
            peer.sock.sendall(raw)
        while len(answers) < count:
            item = peer.frame()
            core = ttrpc.ClientConnection()
            core._next_id = item.stream_id
            core.request("", "")
            (event,) = core.receive(item.raw)
            assert isinstance(event, ResponseReceived)
            answers.append((item.stream_id, event.error.code if event.error else 0))
    return sorted(answers)


def test_misbehaviour_is_answered_by_the_proxy_as_by_go(shim: Shim, proxied: Path) -> None:
    good = asked(shim, "Connect", "one")
    oversize = struct.pack(">IIBB", MAX_DATA + 1, 21, REQUEST, 0) + bytes(MAX_DATA + 1)
    raws = [
        frame(1, REQUEST, 0, good),
        frame(2, REQUEST, 0, good),
        frame(5, 99, 0, b"unknown kind"),
        oversize,
        frame(23, REQUEST, 0, b"\xff"),
        frame(101, REQUEST, 0, good),
    ]
    if shim.demands_growing_ids:
        raws.append(frame(1, REQUEST, 0, good))
    count = len(raws) - 1  # the unknown kind is ignored
    assert told(proxied, raws, count) == told(shim.path, raws, count)


# Our server and a Go client, which publishes what happens to a container


def test_events_of_a_container_reach_our_server(shim: Shim) -> None:
    node = shim.node
    bundle = node.path("/run/bundle")
    (bundle / "rootfs").mkdir(parents=True)
    node.run(["runc", "spec", "--bundle", "/run/bundle"])
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"].update(terminal=False, args=["/bin/true"])
    (bundle / "config.json").write_text(json.dumps(spec))
    create = CreateTaskRequest(
        id="one",
        bundle="/run/bundle",
        rootfs=[Mount(type="bind", source="/", options=["bind", "ro"])],
    )
    with shim.connect() as client:
        client.call(shim.task, "Create", create.encode(), timeout=TIMEOUT)
        client.call(shim.task, "Start", TaskRequest(id="one").encode(), timeout=TIMEOUT)
        topics = {shim.topics.get(timeout=TIMEOUT) for _ in range(3)}
        client.call(shim.task, "Delete", TaskRequest(id="one").encode(), timeout=TIMEOUT)
        topics.add(shim.topics.get(timeout=TIMEOUT))
    assert topics == {("go", f"/tasks/{what}") for what in ("create", "start", "exit", "delete")}


def test_shutdown_answers_and_closes(shim: Shim) -> None:
    with shim.connect() as client:
        assert client.call(shim.task, "Shutdown", b"", timeout=TIMEOUT) == b""
        assert client.wait_closed(TIMEOUT)
