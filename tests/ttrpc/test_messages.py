"""The call's two messages: in step with the .proto, and the small rules around them."""

from __future__ import annotations

import pytest

from shim.ttrpc import messages
from shim.ttrpc.messages import KeyValue, Request, Response, Route, metadata_dict, nano, seconds
from shim.ttrpc.status import UNKNOWN, StatusError
from tests.proto_in_step import assert_in_step


def test_the_tables_are_in_step_with_the_proto_file() -> None:
    assert_in_step("ttrpc.proto", messages, besides=("Route",))


def test_a_route_is_read_from_a_request() -> None:
    request = Request(service="s", method="m", payload=b"p", timeout_nano=1)
    route = Route.decode(request.encode())
    assert (route.service, route.method) == ("s", "m")


@pytest.mark.parametrize(
    ("timeout", "nanoseconds"),
    [(None, 0), (1.5, 1_500_000_000), (0.0, 1), (float("inf"), (1 << 63) - 1)],
)
def test_no_deadline_is_turned_into_none_and_the_other_way(
    timeout: float | None, nanoseconds: int
) -> None:
    assert nano(timeout) == nanoseconds


def test_a_deadline_already_over_is_zero_seconds_and_an_absent_one_none() -> None:
    assert seconds(0) is None
    assert seconds(-5) == 0.0
    assert seconds(2_000_000_000) == 2.0


def test_of_a_repeated_key_the_first_value_counts() -> None:
    entries = [KeyValue(key="a", value="1"), KeyValue(key="a", value="2")]
    assert metadata_dict(entries) == {"a": "1"}


@pytest.mark.parametrize("code", [0, -3, 1 << 40])
def test_an_error_with_an_impossible_code_is_still_told_as_an_error(code: int) -> None:
    answer = Response.decode(messages.error_response(StatusError(code, "text")))
    assert answer.status is not None
    assert (answer.status.code, answer.status.message) == (UNKNOWN, "text")


def test_an_error_text_that_is_endless_or_not_text_still_goes_out() -> None:
    encoded = messages.error_response(StatusError(2, "\udcff" + "ä" * (4 << 20)))
    answer = Response.decode(encoded)
    assert answer.status is not None
    assert answer.status.message.startswith("?ä")
    assert len(encoded) < 2 << 20
