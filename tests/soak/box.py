"""A container on a node through containerd's API, in this process: a CLI's start would cost more
than what it starts. `Box` is one container from its start to its end, over as many tasks as its
rounds make of it, and reads all that its workload says of its tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from shim import messages
from shim.gritctl import messages as m
from shim.gritctl.containerd import CONTAINERS, SNAPSHOTS, TASKS, Containerd, ContainerdError
from shim.restore import ANNOTATION
from tests.e2e.gpu import GRIT, IMAGE, STATUS, until
from tests.nodes.node import SOCKET

if TYPE_CHECKING:
    from pathlib import Path

    from shim.gritctl.containerd import Call
    from tests.e2e.gpu import Job
    from tests.nodes.node import Node

_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
_SNAPSHOTTER = "overlayfs"
_TOKENS = ("cpu", "file", "device")
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
GROUPS = "/run/containerd/grit"


SMALL = ("--bytes", str(256 << 10), "--cpu-bytes", str(256 << 10), "--tick-ms", "20")
"""A workload that is cheap to checkpoint and to check."""


class Wrong(Exception):
    """The workload is not what it was, or something failed that nobody broke."""


class Box:
    """One container; `spec` is its specification, `parent` its image's snapshot, `config` the
    grit.toml it runs under."""

    def __init__(
        self,
        node: Node,
        containerd: Containerd,
        name: str,
        spec: dict[str, Any],
        parent: str,
        config: str,
        runtime: str = GRIT,
    ) -> None:
        self.node = node
        self.containerd = containerd
        self.name = name
        self.lines = 0
        self._spec = spec
        self._config = config
        self._runtime = runtime
        self._snapshot = m.SnapshotRef(snapshotter=_SNAPSHOTTER, key=name, parent=parent)
        self._ref = m.TaskRef(container_id=name)
        self._read = 0  # bytes of the workload's reports
        self._last: dict[str, Any] = {}
        self._again: dict[str, Any] = {}
        self._stdin = f"/run/soak/{name}"
        node.path(self._stdin).parent.mkdir(exist_ok=True)
        if not node.path(self._stdin).exists():
            os.mkfifo(node.path(self._stdin), 0o600)

    # --- life -----------------------------------------------------------------------------

    def start(self) -> None:
        """Anew, from the image. Raises ContainerdError or AssertionError."""
        kept = m.SnapshotRef(
            snapshotter=_SNAPSHOTTER,
            key=self.name,
            parent=self._snapshot.parent,
            labels={"containerd.io/gc.root": "now"},  # also while it has no container
        )
        self.containerd.call(SNAPSHOTS, "Prepare", kept, m.Mounts)
        self._create({})
        self._read, self._last, self._again = 0, {}, {}
        self.run()

    def end(self) -> None:
        """Nothing of it is left."""
        self.kill()
        self.containerd.do(TASKS, "Delete", self._ref)
        self.containerd.do(CONTAINERS, "Delete", m.Id(id=self.name))
        self.containerd.do(SNAPSHOTS, "Remove", self._snapshot)

    def remove(self) -> None:
        """The same, whatever state it is in. Raises AssertionError if there is no end of it."""
        try:
            self.kill()
        except ContainerdError:
            pass  # there is none, or it has ended
        until("the task's removal", self._delete)
        for service, method, request in (
            (CONTAINERS, "Delete", m.Id(id=self.name)),
            (SNAPSHOTS, "Remove", self._snapshot),
        ):
            try:
                self.containerd.do(service, method, request)
            except ContainerdError:
                pass

    def _delete(self) -> bool:
        try:
            self.containerd.do(TASKS, "Delete", self._ref)
        except ContainerdError as error:
            return error.code == "NOT_FOUND"
        return True

    def restore_from(self, images: str) -> None:
        """Names the checkpoint to a new container in the place of the old one, which must have
        ended; its root file system stays."""
        self.containerd.do(TASKS, "Delete", self._ref)
        self.containerd.do(CONTAINERS, "Delete", m.Id(id=self.name))
        self._create({ANNOTATION: os.path.dirname(images)})

    def run(self) -> None:
        """A task for the container. Raises ContainerdError, and then there is no task."""
        begun = self.begin_run()
        try:
            begun.result()
        except ContainerdError:
            self.containerd.do(TASKS, "Delete", self._ref)
            raise

    def begin_run(self) -> Call[m.Nothing]:
        """Makes the task, and the call under way that starts it."""
        self.create()
        return self.begin("Start")

    def create(self) -> None:
        """The task, not started yet. Raises ContainerdError."""
        mounts = self.containerd.call(SNAPSHOTS, "Mounts", self._snapshot, m.Mounts).mounts
        null = f"file://{os.devnull}"
        task = m.NewTask(
            container_id=self.name, rootfs=mounts, stdin=self._stdin, stdout=null, stderr=null
        )
        self.containerd.do(TASKS, "Create", task)

    def delete_task(self) -> None:
        self.containerd.do(TASKS, "Delete", self._ref)

    def kill(self) -> None:
        ended = self.begin_wait()
        kill = m.KillTask(container_id=self.name, signal=9, all=True)
        self.containerd.do(TASKS, "Kill", kill)
        ended.result()

    def begin_wait(self) -> Call[m.Waited]:
        """Comes back when the task has ended."""
        return self.containerd.begin(TASKS, "Wait", self._ref, m.Waited)

    def begin(self, method: str) -> Call[m.Nothing]:
        return self.containerd.begin(TASKS, method, self._ref, m.Nothing)

    def begin_checkpoint(self, images: str, *, end: bool = False) -> Call[m.Nothing]:
        options = messages.CheckpointOptions(image_path=images, exit=end)
        request = m.CheckpointTask(
            container_id=self.name,
            options=m.Any(type_url=messages.CHECKPOINT_OPTIONS, value=options.encode()),
        )
        return self.containerd.begin(TASKS, "Checkpoint", request, m.Nothing)

    def pid(self) -> int:
        """Of its first process, on the host."""
        task = self.containerd.task(self.name)
        assert task, f"no task {self.name}"
        return self.node.host_pid(task.pid)

    def status(self) -> int:
        task = self.containerd.task(self.name)
        return task.status if task else 0

    def _create(self, notes: dict[str, str]) -> None:
        spec = {**self._spec, "annotations": {**self._spec.get("annotations", {}), **notes}}
        options = messages.RuntimeOptions(config_path=self._config)
        container = m.Container(
            id=self.name,
            image=IMAGE,
            runtime=m.Runtime(
                name=self._runtime,
                options=m.Any(type_url=messages.RUNTIME_OPTIONS, value=options.encode()),
            ),
            spec=m.Any(type_url=_SPEC, value=json.dumps(spec).encode()),
            snapshotter=_SNAPSHOTTER,
            snapshot_key=self.name,
        )
        made = m.OneContainer(container=container)
        self.containerd.call(CONTAINERS, "Create", made, m.OneContainer)

    # --- its shim -------------------------------------------------------------------------

    def shims(self) -> dict[str, int]:
        """The pids in the node of its `outer` and `inner` shim."""
        for group in self.node.path(GROUPS).iterdir():
            if (group / "tasks" / self.name).is_symlink() or (group / "tasks" / self.name).exists():
                lines = (group / "processes").read_text().splitlines()
                return {name: int(pid) for name, pid, *_ in map(str.split, lines)}
        raise Wrong(f"{self.name}: no shim serves it")

    # --- its tokens -----------------------------------------------------------------------

    def check(self) -> None:
        """Waits until the workload has gone on, and looks at every line it has written since the
        last time: each tick counted once, each token as it was. Raises Wrong."""
        self._look()
        # The line under way when this was called may be from before.
        begun = self.lines
        until(f"reports of {self.name}", lambda: self._look() and self.lines >= begun + 2)

    def last(self) -> dict[str, Any]:
        """The last that the workload has said."""
        self._look()
        return self._last

    def back_to(self, saved: dict[str, Any]) -> None:
        """It is to go on from there once more. What it has said since then counts all the same, and
        may be read only when it has been restored."""
        self._again = saved

    def _look(self) -> bool:
        try:
            with open(self._reports(), "rb") as file:
                file.seek(self._read)
                text = file.read()
        except FileNotFoundError:
            return False  # a new container's first is still to come
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._compare(json.loads(line))
        return bool(self._last)

    def _compare(self, line: dict[str, Any]) -> None:
        last = self._last or {**line, "counter": -1}
        if self._again and line["counter"] == self._again["counter"] + 1 <= last["counter"]:
            last, self._again = self._again, {}
        if not line["ok"]:
            raise Wrong(f"{self.name}: the workload found a token changed: {line}")
        if line["counter"] != last["counter"] + 1:
            raise Wrong(f"{self.name}: tick {line['counter']} came after {last['counter']}")
        if [line[key] for key in _TOKENS] != [last[key] for key in _TOKENS]:
            raise Wrong(f"{self.name}: tokens {line} are not those of {last}")
        self._last = line
        self.lines += 1

    def rootfs(self) -> Path:
        return self.node.path(f"{BUNDLES}/{self.name}/rootfs")

    def _reports(self) -> Path:
        return self.rootfs() / STATUS.lstrip("/")


def connect(node: Node) -> Containerd:
    return Containerd(str(node.path(SOCKET)), "default")


def pattern(job: Job, containerd: Containerd) -> tuple[dict[str, Any], str]:
    """The specification and the image's snapshot that `ctr run` makes such a job of."""
    job.run()
    ours = m.Id(id=job.name)
    found = containerd.call(CONTAINERS, "Get", ours, m.OneContainer).container
    key = m.SnapshotRef(snapshotter=_SNAPSHOTTER, key=job.name)
    info = containerd.call(SNAPSHOTS, "Stat", key, m.OneSnapshot).info
    assert found and found.spec and info
    job.end()
    return json.loads(found.spec.value), info.parent


def clear(node: Node, directory: str) -> None:
    shutil.rmtree(node.path(directory), ignore_errors=True)
