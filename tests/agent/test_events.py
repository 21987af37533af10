"""Events of Checkpoints and Restores, against a server that speaks HTTP."""

from __future__ import annotations

import pytest

from shim.agent import events
from shim.agent.api import Api, EventsApi
from shim.agent.events import Events
from shim.agent.status import set_phase
from tests.agent.test_api import ONE, config, server

__all__ = ["config", "server"]
PATH = "/api/v1/namespaces/ns/events"


def resource(phase="Pending", reason="Claimed", text="node n1 has the pod", condition=None):
    one = {"metadata": dict(ONE["metadata"])}
    set_phase(one, phase, condition or "Checkpointed", reason, text)
    return one


@pytest.fixture
def lines():
    return []


@pytest.fixture
def told(config, lines):
    return Events(EventsApi(config), "n1", lines.append)


def made(server):
    return [body for method, path, _, body in server.asked if (method, path) == ("POST", PATH)]


def test_one_for_each_change(server, config, told):
    api = Api("checkpoints", config, told.changed)
    for phase, reason in (
        ("Pending", "Claimed"),
        ("Pending", "Claimed"),  # renewed
        ("Checkpointing", "Running"),
        ("Failed", "NodeLost"),
    ):
        one = resource(phase, reason)
        server.answer = (200, one)
        api.put_status(one)
    told.settle()
    found = [(event["type"], event["reason"]) for event in made(server)]
    normal = [("Normal", "Pending"), ("Normal", "Checkpointing")]
    assert found == [*normal, ("Warning", "NodeLost")]
    assert len({event["metadata"]["name"] for event in made(server)}) == 3


def test_what_one_says(server, told):
    server.answer = (201, {})
    told.changed(resource("Restored", "Complete", "main runs again" * 100, "Restored"))
    told.settle()
    (event,) = made(server)
    meta = {key: ONE["metadata"][key] for key in ("namespace", "name", "uid")}
    about = {"apiVersion": "kaito.sh/v1alpha1", "kind": "Restore"}
    assert event["involvedObject"] == {**about, **meta}
    assert event["metadata"]["namespace"] == "ns"
    assert event["source"] == {"component": "grit-agent", "host": "n1"}
    assert len(event["message"]) == 1024


@pytest.mark.parametrize(
    "answer",
    [
        (403, {"message": "not yours"}),
        (404, {"message": "no such resource"}),
        (500, {}),
    ],
    ids=["forbidden", "unknown", "error"],
)
def test_one_that_cannot_be_written_is_told_once_and_hurts_nobody(server, told, lines, answer):
    server.answer = answer
    for reason in ("a", "b", "c"):
        told.changed(resource(reason=reason))
    told.settle()
    assert len(made(server)) == 3
    assert len(lines) == 1
    assert str(answer[0]) in lines[0]
    server.answer = (201, {})
    told.changed(resource(reason="d"))
    told.settle()
    assert (
        made(server)[-1]["metadata"]["name"]
        == events.of(resource(reason="d"), "")["metadata"]["name"]
    )


def test_one_that_is_there_already(server, told, lines):
    server.answer = (409, {"reason": "AlreadyExists"})
    told.changed(resource())
    told.settle()
    assert lines == []


def test_nobody_waits_for_a_server_that_does_not_answer(server, told):
    server.answers.clear()
    for number in range(2000):
        one = resource(text=f"{number}")
        one["metadata"]["uid"] = f"u{number}"
        told.changed(one)
    assert len(told._told) <= 1000
    server.answers.set()
    told.settle()
    assert len(made(server)) <= 102


def test_a_status_that_others_have_filled(told):
    for one in ({}, ONE, {**ONE, "status": {"conditions": []}}, {**ONE, "status": None}):
        told.changed(one)
