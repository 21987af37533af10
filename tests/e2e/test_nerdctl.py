"""nerdctl's two sequences, replayed call by call, under both names by which grit can be run
(nerdctl: pkg/cmd/checkpoint/create.go, pkg/taskutil/taskutil.go)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shim import messages
from tests.e2e.gpu import GRIT, STOCK, configure, go_on, until
from tests.e2e.pods.services import Services
from tests.nodes.node import SOCKET
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

PAUSED = 4


@pytest.fixture
def nerdctl(gpu_node: Place) -> Iterator[Nerdctl]:
    one = Nerdctl(gpu_node[0])
    yield one
    one.close()


class Nerdctl:
    """What `nerdctl checkpoint create` and `nerdctl start --checkpoint` ask of containerd."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.lease = node.ctr("leases", "create").stdout.strip()
        path = node.path(SOCKET)
        self.tasks = Services(path, "containerd.proto", "default", self.lease)
        self.snapshots = Services(path, "snapshots.proto", "default")

    def close(self) -> None:
        self.tasks.close()
        self.snapshots.close()
        self.node.ctr("leases", "rm", self.lease)

    def checkpoint_create(self, job: Job, *, leave_running: bool) -> Any:
        """The checkpoint as containerd describes it, a tar in its content store."""
        name = {"container_id": job.name}
        assert self.tasks("Get", **name).process.status != PAUSED
        self.tasks("Pause", **name)
        try:
            asked: dict[str, Any] = {}
            if job.runtime == STOCK:  # nerdctl knows options for that name only
                options = messages.CheckpointOptions(exit=not leave_running)
                type_url = messages.CHECKPOINT_OPTIONS
                asked = {"options": {"type_url": type_url, "value": options.encode()}}
            (saved,) = self.tasks("Checkpoint", **name, **asked).descriptors
            job.node.run(["sh", "-c", f"ctr snapshots diff {job.name} > /dev/null"])
            return saved
        finally:
            if leave_running or job.runtime != STOCK:
                self.tasks("Resume", **name)

    def start(self, job: Job, checkpoint: Any) -> None:
        """A new task of the same container, from the checkpoint."""
        mounts = self.snapshots("Mounts", snapshotter="overlayfs", key=job.name).mounts
        rootfs = [
            {"type": m.type, "source": m.source, "target": m.target, "options": list(m.options)}
            for m in mounts
        ]
        parts = ("media_type", "digest", "size")
        saved = {part: getattr(checkpoint, part) for part in parts}
        self.tasks("Create", container_id=job.name, rootfs=rootfs, checkpoint=saved)
        self.tasks("Start", container_id=job.name)


@pytest.mark.parametrize("runtime", [GRIT, STOCK])
def test_leave_running(
    gpu_node: Place, start_job: StartJob, nerdctl: Nerdctl, runtime: str, engine: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=runtime)
    before = job.next_report()
    nerdctl.checkpoint_create(job, leave_running=True)
    go_on(before, job.next_report())
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)


@pytest.mark.parametrize("runtime", [GRIT, STOCK])
def test_create_and_start(
    gpu_node: Place, start_job: StartJob, nerdctl: Nerdctl, runtime: str, engine: str
) -> None:
    """Without --leave-running the container ends, and starts from where it was; under grit's own
    name nerdctl has no way to say so, and it runs on."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=runtime)
    before = job.next_report()
    saved = nerdctl.checkpoint_create(job, leave_running=False)
    if runtime == GRIT:
        go_on(before, job.next_report())
        job.ctr("task", "kill", "--signal", "SIGKILL", job.name)
    until("its end", lambda: job.status() == "STOPPED")
    nerdctl.tasks("Delete", container_id=job.name)
    assert board.owners() == {}
    nerdctl.start(job, saved)
    go_on(before, job.next_report())
    if runtime == STOCK:  # the file system is as it was when the memory was saved
        counts = [report.counter for report in job.reports()]
        assert counts == list(range(len(counts)))
