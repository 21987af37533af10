"""The task service's messages against proto/, and against what a containerd really sends."""

from __future__ import annotations

from shim import messages
from tests.proto_in_step import assert_in_step

OPTIONS = ("RuncOptions", "CheckpointOptions", "RuntimeOptions")
TASK = (
    "Any",
    "CreateTaskRequest",
    "ExecRequest",
    "TaskRequest",
    "KillRequest",
    "ShutdownRequest",
    "ConnectResponse",
    "StateResponse",
    "StartResponse",
    "CheckpointTaskRequest",
)


def test_task_messages_are_in_step_with_proto() -> None:
    assert_in_step("task.proto", messages, besides=OPTIONS)


def test_options_are_in_step_with_proto() -> None:
    assert_in_step("runc_options.proto", messages, besides=TASK)


def test_a_create_request_keeps_what_the_shim_does_not_read() -> None:
    # rootfs = 3, stdout = 6: fields of the real request that are not declared here
    wire = bytes.fromhex("0a036f6e65") + bytes.fromhex("1a0512036e6574") + bytes.fromhex("32022f6f")
    request = messages.CreateTaskRequest.decode(wire)
    request.checkpoint = "/images"
    again = messages.CreateTaskRequest.decode(request.encode())
    assert (again.id, again.checkpoint) == ("one", "/images")
    assert bytes.fromhex("1a0512036e6574") in request.encode()
    assert bytes.fromhex("32022f6f") in request.encode()
