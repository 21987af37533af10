"""What gritctl says to containerd, kept in step with proto/containerd.proto by a test. Messages of
the same shape are declared once; fields not declared are kept as they came.
"""

from __future__ import annotations

from shim.protowire import (
    Message,
    bool_,
    bytes_,
    enum,
    int32,
    int64,
    message,
    repeated,
    string,
    string_map,
    uint32,
)

CREATED, RUNNING, STOPPED, PAUSED, PAUSING = 1, 2, 3, 4, 5
"""A task's status."""


class Nothing(Message):
    """google.protobuf.Empty."""


class Any(Message):
    """google.protobuf.Any and Timestamp as they look on the wire."""

    type_url: str = string(1)
    value: bytes = bytes_(2)


class Timestamp(Message):
    seconds: int = int64(1)
    nanos: int = int32(2)


class Mount(Message):
    type: str = string(1)
    source: str = string(2)
    target: str = string(3)
    options: list[str] = repeated(string(4))


class Descriptor(Message):
    """Content by its digest."""

    media_type: str = string(1)
    digest: str = string(2)
    size: int = int64(3)


class Runtime(Message):
    name: str = string(1)
    options: Any | None = message(2, Any)


class Extension(Message):
    """An entry of a map; CRI keeps what it knows of a container here."""

    key: str = string(1)
    value: Any | None = message(2, Any)


class Container(Message):
    id: str = string(1)
    labels: dict[str, str] = string_map(2)
    image: str = string(3)
    runtime: Runtime | None = message(4, Runtime)
    spec: Any | None = message(5, Any)
    snapshotter: str = string(6)
    snapshot_key: str = string(7)
    created_at: Timestamp | None = message(8, Timestamp)
    extensions: list[Extension] = repeated(message(10, Extension))
    sandbox: str = string(11)


class Id(Message):
    """Get and Delete of a container; the answer to a new lease."""

    id: str = string(1)


class Filters(Message):
    filters: list[str] = repeated(string(1))


class OneContainer(Message):
    """Create's request, Get's and Create's answer."""

    container: Container | None = message(1, Container)


class ContainerList(Message):
    containers: list[Container] = repeated(message(1, Container))


class Task(Message):
    container_id: str = string(1)
    id: str = string(2)
    pid: int = uint32(3)
    status: int = enum(4)
    stdout: str = string(6)
    terminal: bool = bool_(8)


class OneTask(Message):
    process: Task | None = message(1, Task)


class TaskList(Message):
    tasks: list[Task] = repeated(message(1, Task))


class NewTask(Message):
    container_id: str = string(1)
    rootfs: list[Mount] = repeated(message(3, Mount))
    stdin: str = string(4)
    stdout: str = string(5)
    stderr: str = string(6)
    terminal: bool = bool_(7)
    options: Any | None = message(9, Any)


class TaskRef(Message):
    """Get, Start, Pause, Resume, Delete, ListPids, Wait."""

    container_id: str = string(1)


class KillTask(Message):
    container_id: str = string(1)
    signal: int = uint32(3)
    all: bool = bool_(4)


class CheckpointTask(Message):
    container_id: str = string(1)
    options: Any | None = message(3, Any)


class Pid(Message):
    pid: int = uint32(1)


class PidList(Message):
    """Start's answer has one pid in the same place as each of ListPids'."""

    processes: list[Pid] = repeated(message(1, Pid))


class Waited(Message):
    exit_status: int = uint32(1)


class SnapshotRef(Message):
    """Prepare, View, Mounts, Stat and Remove."""

    snapshotter: str = string(1)
    key: str = string(2)
    parent: str = string(3)
    labels: dict[str, str] = string_map(4)


class Mounts(Message):
    mounts: list[Mount] = repeated(message(1, Mount))


class SnapshotInfo(Message):
    name: str = string(1)
    parent: str = string(2)


class OneSnapshot(Message):
    info: SnapshotInfo | None = message(1, SnapshotInfo)


class DiffRequest(Message):
    left: list[Mount] = repeated(message(1, Mount))
    right: list[Mount] = repeated(message(2, Mount))
    media_type: str = string(3)
    ref: str = string(4)


class DiffReply(Message):
    diff: Descriptor | None = message(3, Descriptor)


class ReadContent(Message):
    digest: str = string(1)
    offset: int = int64(2)
    size: int = int64(3)


class Content(Message):
    offset: int = int64(1)
    data: bytes = bytes_(2)


class IngestRef(Message):
    ref: str = string(1)


class Ingest(Message):
    """Content that is being written."""

    ref: str = string(3)
    offset: int = int64(4)


class OneIngest(Message):
    status: Ingest | None = message(1, Ingest)


class NewLease(Message):
    id: str = string(1)
    labels: dict[str, str] = string_map(3)


class LeaseRef(Message):
    id: str = string(1)
    sync: bool = bool_(2)


class Version(Message):
    version: str = string(1)
    revision: str = string(2)


class PluginError(Message):
    code: int = int32(1)
    message: str = string(2)


class Plugin(Message):
    type: str = string(1)
    id: str = string(2)
    init_err: PluginError | None = message(7, PluginError)


class PluginList(Message):
    plugins: list[Plugin] = repeated(message(1, Plugin))
