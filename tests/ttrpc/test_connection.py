"""The state machine of both roles, by events alone."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from shim.ttrpc.connection import (
    ClientConnection,
    ServerConnection,
    ServerEvent,
    StreamClosed,
    failure,
    response,
)
from shim.ttrpc.events import DataEnded, DataReceived, Refused, RequestReceived, ResponseReceived
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
    frame,
)
from shim.ttrpc.messages import Request, Response, Status
from shim.ttrpc.status import (
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    RESOURCE_EXHAUSTED,
    StatusError,
)

REQUEST_DATA = Request(service="s", method="m").encode()


def request(stream_id: int, flags: int = 0) -> bytes:
    return frame(stream_id, REQUEST, flags, REQUEST_DATA)


def refusal(events: list[ServerEvent]) -> tuple[int, int]:
    """The stream and code of the one refusal there is; what it has sent says the same."""
    (event,) = events
    assert isinstance(event, Refused)
    (answer,) = FrameReader().feed(event.answer)
    assert isinstance(answer, Frame)
    assert (answer.kind, answer.stream_id) == (RESPONSE, event.stream_id)
    status = Response.decode(answer.data).status
    assert status is not None
    assert (status.code, status.message) == (event.error.code, event.error.message)
    return event.stream_id, event.error.code


# A unary call


def test_a_unary_call_from_one_side_to_the_other() -> None:
    client, server = ClientConnection(), ServerConnection()
    stream_id, raw = client.request("s", "m", b"ask", timeout=2.5, metadata={"k": "v"})
    assert server.receive(raw) == [
        RequestReceived(stream_id, "s", "m", b"ask", timeout=2.5, metadata={"k": "v"})
    ]
    assert server.streams == 1
    assert client.receive(server.respond(stream_id, b"answer")) == [
        ResponseReceived(stream_id, b"answer")
    ]
    assert server.streams == 0


def test_answers_may_come_in_any_order() -> None:
    client, server = ClientConnection(), ServerConnection()
    (first, raw1), (second, raw2) = client.request("s", "m"), client.request("s", "m")
    assert len(server.receive(raw1 + raw2)) == 2
    answers = server.respond(second, b"2") + server.fail(first, StatusError(NOT_FOUND, "no"))
    assert client.receive(answers) == [
        ResponseReceived(second, b"2"),
        ResponseReceived(first, b"", StatusError(NOT_FOUND, "no")),
    ]


def test_a_clients_ids_are_odd_and_grow() -> None:
    client = ClientConnection()
    assert [client.request("s", "m")[0] for _ in range(3)] == [1, 3, 5]


def test_a_request_that_is_too_long_takes_no_id() -> None:
    client = ClientConnection()
    with pytest.raises(StatusError, match="maximum message size"):
        client.request("s", "m", bytes(MAX_DATA))
    assert client.request("s", "m")[0] == 1


def test_ids_run_out_with_an_error_not_with_a_reuse() -> None:
    client = ClientConnection()
    client._next_id = 2**32 - 1
    assert client.request("s", "m")[0] == 2**32 - 1
    with pytest.raises(StatusError, match="used up"):
        client.request("s", "m")


def test_a_late_answer_to_a_call_given_up_is_ignored() -> None:
    client = ClientConnection()
    stream_id, _ = client.request("s", "m")
    client.forget(stream_id)
    assert client.receive(response(stream_id, b"late")) == []


def test_a_payload_too_long_to_answer_with_becomes_an_error() -> None:
    client = ClientConnection()
    stream_id, _ = client.request("s", "m")
    (event,) = client.receive(response(stream_id, bytes(MAX_DATA)))
    assert isinstance(event, ResponseReceived)
    assert event.error is not None
    assert event.error.code == RESOURCE_EXHAUSTED


# What a client may do wrong


def test_an_even_id_is_refused_on_any_kind_of_frame() -> None:
    server = ServerConnection()
    for kind in (REQUEST, RESPONSE, DATA, 99):
        assert refusal(server.receive(frame(4, kind))) == (4, INVALID_ARGUMENT)


@pytest.mark.parametrize("again", [5, 3])
def test_an_id_that_does_not_grow_is_refused(again: int) -> None:
    server = ServerConnection()
    server.receive(request(5))
    assert refusal(server.receive(request(again))) == (again, INVALID_ARGUMENT)


def test_gaps_between_ids_are_fine() -> None:
    server = ServerConnection()
    events = server.receive(request(1) + request(9) + request(2**32 - 1))
    assert [event.stream_id for event in events] == [1, 9, 2**32 - 1]


def test_an_oversize_frame_is_refused_on_its_stream_and_the_connection_goes_on() -> None:
    server = ServerConnection()
    oversize = struct.pack(">IIBB", MAX_DATA + 1, 1, REQUEST, 0) + bytes(MAX_DATA + 1)
    assert refusal(server.receive(oversize)) == (1, RESOURCE_EXHAUSTED)
    assert server.receive(request(1)) == [RequestReceived(1, "s", "m")]


def test_a_request_that_is_no_message_is_refused() -> None:
    server = ServerConnection()
    assert refusal(server.receive(frame(1, REQUEST, 0, b"\xff"))) == (1, INVALID_ARGUMENT)
    assert server.streams == 0


def test_unknown_kinds_and_responses_to_a_server_are_ignored() -> None:
    server = ServerConnection()
    assert server.receive(frame(1, 99, 7, b"future") + frame(1, RESPONSE)) == []


@pytest.mark.parametrize("flags", [0, REMOTE_CLOSED])
def test_data_on_a_stream_closed_from_the_start_is_refused(flags: int) -> None:
    server = ServerConnection()
    server.receive(request(1, flags))
    assert refusal(server.receive(frame(1, DATA, 0, b"x"))) == (1, INVALID_ARGUMENT)
    with pytest.raises(StreamClosed):
        server.respond(1, b"")


def test_data_on_no_stream_is_refused() -> None:
    assert refusal(ServerConnection().receive(frame(1, DATA))) == (1, INVALID_ARGUMENT)


def test_a_close_that_carries_data_is_refused() -> None:
    server = ServerConnection()
    server.receive(request(1, REMOTE_OPEN))
    assert refusal(server.receive(frame(1, DATA, REMOTE_CLOSED, b"x"))) == (1, INVALID_ARGUMENT)


# Streams


def test_a_stream_of_messages_each_way() -> None:
    client, server = ClientConnection(), ServerConnection()
    stream_id, raw = client.request("s", "m", flags=REMOTE_OPEN)
    assert server.receive(raw) == [RequestReceived(stream_id, "s", "m", open=True)]
    sent = client.send_data(stream_id, b"1") + client.send_data(stream_id, b"")
    assert server.receive(sent + client.end_data(stream_id)) == [
        DataReceived(stream_id, b"1"),
        DataReceived(stream_id, b""),
        DataEnded(stream_id),
    ]
    answers = server.send_data(stream_id, b"2") + server.end_data(stream_id)
    assert client.receive(answers) == [DataReceived(stream_id, b"2"), DataEnded(stream_id)]
    with pytest.raises(StreamClosed):
        client.send_data(stream_id, b"")
    with pytest.raises(StreamClosed):
        server.send_data(stream_id, b"")


def test_a_server_may_close_with_its_last_message() -> None:
    client = ClientConnection()
    stream_id, _ = client.request("s", "m", flags=REMOTE_CLOSED)
    assert client.receive(frame(stream_id, DATA, REMOTE_CLOSED, b"last")) == [
        DataReceived(stream_id, b"last"),
        DataEnded(stream_id),
    ]


def test_a_stream_may_end_with_a_response() -> None:
    client, server = ClientConnection(), ServerConnection()
    stream_id, raw = client.request("s", "m", flags=REMOTE_OPEN)
    server.receive(raw + client.end_data(stream_id))
    assert client.receive(server.respond(stream_id, b"sum")) == [
        ResponseReceived(stream_id, b"sum")
    ]


@pytest.mark.parametrize("flags", [0, REMOTE_CLOSED])
def test_a_client_that_said_it_sends_nothing_cannot_send(flags: int) -> None:
    client = ClientConnection()
    stream_id, _ = client.request("s", "m", flags=flags)
    with pytest.raises(StreamClosed):
        client.send_data(stream_id, b"")


# What a server may do wrong costs one call


@pytest.mark.parametrize(
    "raw",
    [
        frame(1, DATA, 0, b"data on a unary call"),
        frame(1, REQUEST, 0, b""),
        frame(1, 99),
        frame(1, RESPONSE, 0, b"\xff"),
    ],
)
def test_a_frame_that_makes_no_sense_fails_its_call(raw: bytes) -> None:
    client = ClientConnection()
    client.request("s", "m")
    (event,) = client.receive(raw)
    assert isinstance(event, ResponseReceived)
    assert event.error is not None
    assert event.error.code == INTERNAL


def test_an_oversize_answer_fails_its_call_and_the_connection_goes_on() -> None:
    client = ClientConnection()
    client.request("s", "m")
    client.request("s", "m")
    raw = struct.pack(">IIBB", MAX_DATA + 1, 1, RESPONSE, 0) + bytes(MAX_DATA + 1)
    first, second = client.receive(raw + response(3, b"fine"))
    assert isinstance(first, ResponseReceived)
    assert first.error is not None
    assert first.error.code == RESOURCE_EXHAUSTED
    assert second == ResponseReceived(3, b"fine")


def test_a_status_of_ok_is_no_error() -> None:
    client = ClientConnection()
    client.request("s", "m")
    data = Response(status=Status(code=0, message="fine"), payload=b"p").encode()
    assert client.receive(frame(1, RESPONSE, 0, data)) == [ResponseReceived(1, b"p")]


def test_failure_carries_code_and_text() -> None:
    client = ClientConnection()
    client.request("s", "m")
    assert client.receive(failure(1, StatusError(5, "not here"))) == [
        ResponseReceived(1, b"", StatusError(5, "not here"))
    ]


def test_events_show_themselves() -> None:
    assert repr(DataReceived(1, b"x")) == "DataReceived(payload=b'x', stream_id=1)"
    assert DataEnded(1) != DataEnded(3)


# Any bytes, any order

frames = st.builds(
    frame,
    st.integers(0, 9),
    st.integers(0, 4),
    st.integers(0, 7),
    st.binary(max_size=4) | st.just(REQUEST_DATA),
)


@given(st.lists(frames))
def test_a_server_survives_any_frames_and_answers_only_what_was_asked(raws: list[bytes]) -> None:
    server = ServerConnection()
    open_streams: set[int] = set()
    for raw in raws:
        for event in server.receive(raw):
            if isinstance(event, RequestReceived):
                assert event.stream_id not in open_streams
                open_streams.add(event.stream_id)
            elif isinstance(event, Refused):
                open_streams.discard(event.stream_id)
            else:
                assert event.stream_id in open_streams
    assert server.streams == len(open_streams)
    for stream_id in open_streams:
        server.respond(stream_id, b"")
    assert server.streams == 0


@given(st.lists(frames), st.integers(0, 4))
def test_a_client_survives_any_frames_and_ends_each_call_once(
    raws: list[bytes], calls: int
) -> None:
    client = ClientConnection()
    flags = [0, REMOTE_CLOSED, REMOTE_OPEN]
    under_way = {client.request("s", "m", flags=flags[n % 3])[0] for n in range(calls)}
    for raw in raws:
        for event in client.receive(raw):
            assert event.stream_id in under_way
            if not isinstance(event, DataReceived):
                under_way.remove(event.stream_id)


class TwoPeers(RuleBasedStateMachine):
    """Client and server talk as they please; both see the same messages, in order, per stream."""

    streams = Bundle("streams")

    def __init__(self) -> None:
        super().__init__()
        self.client, self.server = ClientConnection(), ServerConnection()
        self.to_server: dict[int, list[bytes]] = {}
        self.seen_by_server: dict[int, list[bytes]] = {}
        self.to_client: dict[int, list[bytes]] = {}
        self.seen_by_client: dict[int, list[bytes]] = {}
        self.kinds: dict[int, int] = {}
        self.closed: set[int] = set()
        self.over: set[int] = set()

    @rule(target=streams, flags=st.sampled_from([0, REMOTE_CLOSED, REMOTE_OPEN]))
    def begin(self, flags: int) -> int:
        stream_id, raw = self.client.request("s", "m", flags=flags)
        assert self.server.receive(raw) == [
            RequestReceived(stream_id, "s", "m", open=flags == REMOTE_OPEN)
        ]
        self.kinds[stream_id] = flags
        for table in (self.to_server, self.seen_by_server, self.to_client, self.seen_by_client):
            table[stream_id] = []
        return stream_id

    @rule(stream_id=streams, payload=st.binary(max_size=8))
    def client_sends(self, stream_id: int, payload: bytes) -> None:
        may = self.kinds[stream_id] == REMOTE_OPEN and stream_id not in self.closed | self.over
        if not may:
            with pytest.raises(StreamClosed):
                self.client.send_data(stream_id, payload)
            return
        self.to_server[stream_id].append(payload)
        for event in self.server.receive(self.client.send_data(stream_id, payload)):
            assert isinstance(event, DataReceived)
            self.seen_by_server[event.stream_id].append(event.payload)

    @rule(stream_id=streams)
    def client_closes(self, stream_id: int) -> None:
        if self.kinds[stream_id] == REMOTE_OPEN and stream_id not in self.closed | self.over:
            raw = self.client.end_data(stream_id)
            assert self.server.receive(raw) == [DataEnded(stream_id)]
            self.closed.add(stream_id)

    @rule(stream_id=streams, payload=st.binary(max_size=8))
    def server_sends(self, stream_id: int, payload: bytes) -> None:
        if stream_id in self.over or not self.kinds[stream_id]:
            return
        self.to_client[stream_id].append(payload)
        for event in self.client.receive(self.server.send_data(stream_id, payload)):
            assert isinstance(event, DataReceived)
            self.seen_by_client[event.stream_id].append(event.payload)

    @rule(stream_id=streams, way=st.sampled_from(["respond", "fail", "end"]))
    def server_ends(self, stream_id: int, way: str) -> None:
        if stream_id in self.over:
            with pytest.raises(StreamClosed):
                self.server.respond(stream_id, b"")
            return
        if way == "respond":
            events = self.client.receive(self.server.respond(stream_id, b"r"))
            assert events == [ResponseReceived(stream_id, b"r")]
        elif way == "fail" or not self.kinds[stream_id]:
            error = StatusError(2, "e")
            events = self.client.receive(self.server.fail(stream_id, error))
            assert events == [ResponseReceived(stream_id, b"", error)]
        else:
            raw = self.server.end_data(stream_id)
            assert self.client.receive(raw) == [DataEnded(stream_id)]
        self.over.add(stream_id)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.seen_by_server == self.to_server
        assert self.seen_by_client == self.to_client
        assert self.server.streams == len(self.kinds) - len(self.over)


TestTwoPeers = TwoPeers.TestCase
TestTwoPeers.settings = settings(max_examples=60, stateful_step_count=25)


def test_no_data_flag_means_there_is_no_message() -> None:
    server = ServerConnection()
    server.receive(request(1, REMOTE_OPEN))
    assert server.receive(frame(1, DATA, NO_DATA)) == []
    assert server.receive(frame(1, DATA)) == [DataReceived(1, b"")]
