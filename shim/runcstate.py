"""The one module that knows runc's `state.json`: where it lies and what its keys mean.

It turns the file into a `RunState` with the fields a checkpoint needs, in our own words, and
says plainly what is missing. It must never write below runc's root: the file belongs to runc.
The keys are those of runc 1.1 (libcontainer/container.go and configs/config.go) and are the
same through 1.5; keys we do not use are ignored, so a newer file still loads.
"""

from __future__ import annotations

import os

DEFAULT_ROOT = "/run/containerd/runc"


class StateError(Exception):
    """runc's state of a container is absent, unreadable, or lacks what a checkpoint needs."""


class Mount:
    """One entry of runc's `config.mounts`; `device` is the file system type, or "bind"."""

    __slots__ = ("destination", "device", "source")

    def __init__(self, source: str, destination: str, device: str) -> None:
        self.source = source
        self.destination = destination
        self.device = device

    def __repr__(self) -> str:
        return f"Mount({self.source!r}, {self.destination!r}, {self.device!r})"


class Namespace:
    """One namespace of the container: `type` as runc spells it ("NEWNET"), and the `path` it
    was told to join, or "" where the container got one of its own."""

    __slots__ = ("path", "type")

    def __init__(self, type_: str, path: str) -> None:
        self.type = type_
        self.path = path

    def __repr__(self) -> str:
        return f"Namespace({self.type!r}, {self.path!r})"


class RunState:
    """What runc recorded of a container.

    `directory` is the folder of state.json; pids are in the pid namespace runc ran in;
    `init_process_start` is field 22 of /proc/PID/stat (clock ticks since boot);
    `cgroup_paths` maps a v1 controller to its absolute directory, and "" to the v2 one;
    `external_descriptors` are the init's stdin, stdout and stderr as they were at create
    ("pipe:[123]", "/dev/null"), None where runc recorded none; `labels` are the annotations
    runc kept, as a dict.
    """

    __slots__ = (
        "cgroup_paths",
        "devices",
        "directory",
        "external_descriptors",
        "id",
        "init_process_pid",
        "init_process_start",
        "labels",
        "mask_paths",
        "mounts",
        "namespace_paths",
        "namespaces",
        "rootfs",
    )

    def __init__(
        self,
        *,
        directory: str,
        id: str,
        init_process_pid: int,
        init_process_start: int,
        rootfs: str,
        cgroup_paths: dict[str, str],
        external_descriptors: list[str] | None,
        mounts: list[Mount],
        mask_paths: list[str],
        devices: list[str],
        namespaces: list[Namespace],
        namespace_paths: dict[str, str],
        labels: dict[str, str],
    ) -> None:
        self.directory = directory
        self.id = id
        self.init_process_pid = init_process_pid
        self.init_process_start = init_process_start
        self.rootfs = rootfs
        self.cgroup_paths = cgroup_paths
        self.external_descriptors = external_descriptors
        self.mounts = mounts
        self.mask_paths = mask_paths
        self.devices = devices
        self.namespaces = namespaces
        self.namespace_paths = namespace_paths
        self.labels = labels

    @property
    def unified(self) -> bool:
        """True on a pure cgroup v2 node. On a hybrid one runc records the v2 directory too,
        under the same key "", beside those of the v1 controllers."""
        return set(self.cgroup_paths) == {""}

    @property
    def freezer_path(self) -> str | None:
        """The cgroup directory whose freezer holds the container, or None."""
        return self.cgroup_paths.get("" if self.unified else "freezer")

    def has_namespace(self, type_: str) -> bool:
        return any(ns.type == type_ for ns in self.namespaces)

    def namespace_path(self, type_: str) -> str:
        """The path the container's namespace of that type was joined from, "" if its own."""
        for ns in self.namespaces:
            if ns.type == type_:
                return ns.path
        return ""


def state_path(root: str, namespace: str, id: str) -> str:
    """Where runc keeps the state: the runc shim passes `--root ROOT/NAMESPACE`."""
    return os.path.join(root, namespace, id, "state.json")


def load(root: str, namespace: str, id: str) -> RunState:
    """Read the state of container `id` of a containerd namespace. Raises StateError."""
    path = state_path(root, namespace, id)
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        raise StateError(
            f"container {id}: runc has no state at {path}: it was never started, is already "
            f"deleted, or runc's root is not {root}"
        ) from None
    except OSError as err:
        raise StateError(f"container {id}: cannot read runc's state {path}: {err}") from err
    return parse(data, path)


def parse(data: bytes, path: str) -> RunState:
    """Turn the bytes of a state.json into a RunState; `path` is where they came from."""
    import json

    try:
        top = json.loads(data)
    except ValueError as err:
        raise StateError(f"runc's state {path} is not JSON: {err}") from err
    reader = _Reader(path, top)
    config = _Reader(path, reader.get("config", dict, required=True), "config.")
    state = RunState(
        directory=os.path.dirname(path),
        id=reader.get("id", str, required=True),
        init_process_pid=reader.get("init_process_pid", int, required=True),
        init_process_start=reader.get("init_process_start", int, required=True),
        rootfs=config.get("rootfs", str, required=True),
        cgroup_paths=reader.get("cgroup_paths", dict) or {},
        external_descriptors=reader.get("external_descriptors", list),
        mounts=[
            Mount(entry.get("source", str), entry.get("destination", str), entry.get("device", str))
            for entry in config.entries("mounts")
        ],
        mask_paths=config.get("mask_paths", list) or [],
        devices=[entry.get("path", str) for entry in config.entries("devices")],
        namespaces=[
            Namespace(entry.get("type", str), entry.get("path", str))
            for entry in config.entries("namespaces")
        ],
        namespace_paths=reader.get("namespace_paths", dict) or {},
        # "key=value"; runc adds "bundle=..." to the spec's annotations.
        labels=dict(
            label.partition("=")[::2] for label in config.get("labels", list) or [] if label
        ),
    )
    if state.init_process_pid <= 0:
        raise StateError(f"container {state.id}: runc records no init process in {path}")
    return state


class _Reader:
    """Typed look-ups in one JSON object, with the key's full name in every complaint."""

    def __init__(self, path: str, value: object, prefix: str = "") -> None:
        if not isinstance(value, dict):
            raise StateError(f"runc's state {path}: {prefix or 'the file'} is not an object")
        self._path = path
        self._value = value
        self._prefix = prefix

    # The kind decides the type of the answer; Any keeps the call sites free of casts.
    def get(self, key: str, kind: type, *, required: bool = False) -> Any:
        value = self._value.get(key)
        if value is None:
            if required:
                raise StateError(f"runc's state {self._path} has no {self._prefix}{key}")
            return "" if kind is str else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise StateError(
                f"runc's state {self._path}: {self._prefix}{key} is "
                f"{type(value).__name__}, expected {kind.__name__}"
            )
        return value

    def entries(self, key: str) -> list[_Reader]:
        return [
            _Reader(self._path, entry, f"{self._prefix}{key}[{index}].")
            for index, entry in enumerate(self.get(key, list) or [])
        ]


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
