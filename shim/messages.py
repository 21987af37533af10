"""The messages of containerd's task service that this shim reads or changes.

Versions 2 and 3 of the service are the same field by field; only the package differs
(containerd 1.6 runtime/v2/task/shim.proto, 2.1 api/runtime/task/v3). Only the fields in
use are declared: the codec keeps the others as they came. `proto/task.proto` and
`proto/runc_options.proto` say the same, and a test holds the two in step.
"""

from __future__ import annotations

from shim.protowire import (
    Message,
    bool_,
    bytes_,
    enum,
    message,
    repeated,
    string,
    uint32,
)

SERVICES = ("containerd.task.v2.Task", "containerd.task.v3.Task")

RUNC_OPTIONS = "containerd.runc.v1.Options"
CHECKPOINT_OPTIONS = "containerd.runc.v1.CheckpointOptions"
RUNTIME_OPTIONS = "runtimeoptions.v1.Options"

RUNNING, STOPPED, PAUSED, PAUSING = 2, 3, 4, 5
"""Statuses in a StateResponse."""


class Any(Message):
    """google.protobuf.Any; containerd's type URLs carry no prefix."""

    type_url: str = string(1)
    value: bytes = bytes_(2)


class CreateTaskRequest(Message):
    id: str = string(1)
    bundle: str = string(2)
    terminal: bool = bool_(4)
    checkpoint: str = string(8)
    options: Any | None = message(10, Any)


class ExecRequest(Message):
    """The head shared by Start, Delete, State and Kill requests: a task, or one of its execs."""

    id: str = string(1)
    exec_id: str = string(2)


class TaskRequest(Message):
    """Pause, Resume and Pids name a task and nothing else."""

    id: str = string(1)


class KillRequest(Message):
    id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint32(3)
    all: bool = bool_(4)


class ShutdownRequest(Message):
    id: str = string(1)
    now: bool = bool_(2)


class ConnectResponse(Message):
    shim_pid: int = uint32(1)
    task_pid: int = uint32(2)
    version: str = string(3)


class StateResponse(Message):
    id: str = string(1)
    bundle: str = string(2)
    pid: int = uint32(3)
    status: int = enum(4)


class StartResponse(Message):
    pid: int = uint32(1)


class CheckpointTaskRequest(Message):
    """`path` is where containerd wants the images unless the options name another place."""

    id: str = string(1)
    path: str = string(2)
    options: Any | None = message(3, Any)


class CheckpointOptions(Message):
    """containerd.runc.v1.CheckpointOptions; all clients but nerdctl and CRI send it."""

    exit: bool = bool_(1)
    open_tcp: bool = bool_(2)
    external_unix_sockets: bool = bool_(3)
    terminal: bool = bool_(4)
    file_locks: bool = bool_(5)
    empty_namespaces: list[str] = repeated(string(6))
    cgroups_mode: str = string(7)
    image_path: str = string(8)
    work_path: str = string(9)


class RuncOptions(Message):
    """containerd.runc.v1.Options: what the stock shim wants to know about runc."""

    no_pivot_root: bool = bool_(1)
    no_new_keyring: bool = bool_(2)
    shim_cgroup: str = string(3)
    io_uid: int = uint32(4)
    io_gid: int = uint32(5)
    binary_name: str = string(6)
    root: str = string(7)
    criu_path: str = string(8)
    systemd_cgroup: bool = bool_(9)
    criu_image_path: str = string(10)
    criu_work_path: str = string(11)


class RuntimeOptions(Message):
    """runtimeoptions.v1.Options: what containerd sends any runtime not called runc."""

    type_url: str = string(1)
    config_path: str = string(2)
    config_body: bytes = bytes_(3)
