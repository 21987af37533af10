"""Clients under both names by which grit can be run: ctr, and nerdctl's two sequences, replayed
call by call (nerdctl: pkg/cmd/checkpoint/create.go, pkg/taskutil/taskutil.go).

nerdctl asks for `exit` of runtimes named runc only, and cannot name a shim's path. So grit stands
where containerd looks for the stock shim: 1.x in its PATH, 2.1 beside its own program, where the
stock shim gives way to it and is found in the PATH.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from shim import messages
from tests.e2e.conftest import running
from tests.e2e.gpu import (
    GRIT,
    GRIT_AS_RUNC,
    NO_GPU_CHECK,
    STOCK,
    configure,
    go_on,
    gpu_of,
    grit_as_runc,
    kit_binds,
    until,
)
from tests.e2e.pods.services import Services
from tests.nodes.installed import OLD, SHIM
from tests.nodes.node import CONFIG_WITHOUT_CRI, ENVIRONMENT, SOCKET
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

PAUSED = 4
CHECKPOINT = "application/vnd.containerd.container.criu.checkpoint.criu.tar"
ELSEWHERE = "/usr/libexec/stock-shim"
EVERYWHERE = pytest.mark.parametrize("gpu_node", [OLD, "13", "forky"], indirect=True)
"""For what fills the table of clients."""


@pytest.fixture(scope="module", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Nodes of this module's own: the name of the stock shim is grit's there, everywhere."""
    cgroup = "v2" if request.param == "forky" else "v1"
    path = f"{GRIT_AS_RUNC}:{ENVIRONMENT['PATH']}:{ELSEWHERE}"
    env = {**NO_GPU_CHECK, "PATH": path}
    options = {"cgroup": cgroup, "binds": kit_binds(), "env": env}
    with running(request.param, config=CONFIG_WITHOUT_CRI, **options) as node:
        if node.containerd_version < (2, 0):
            grit_as_runc(node)
        else:
            node.path(ELSEWHERE).mkdir(parents=True)
            stock = "/usr/bin/containerd-shim-runc-v2"
            node.run(["mv", stock, f"{ELSEWHERE}/"])
            node.run(["ln", "-s", SHIM, stock])
        yield node, gpu_of(node, capacity=16 << 20)


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
            written = self.tasks("Checkpoint", **name, **asked).descriptors
            (saved,) = (one for one in written if one.media_type == CHECKPOINT)
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
    gpu_node: Place, start_job: StartJob, nerdctl: Nerdctl, runtime: str
) -> None:
    node, board = gpu_node
    configure(node)
    job = start_job(runtime=runtime)
    before = job.next_report()
    nerdctl.checkpoint_create(job, leave_running=True)
    go_on(before, job.next_report())
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)


@EVERYWHERE
@pytest.mark.cell("`ctr container checkpoint`, `restore`")
@pytest.mark.parametrize("runtime", [GRIT, STOCK])
def test_ctr(gpu_node: Place, start_job: StartJob, runtime: str, engine: str) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    options = ["--runc-root=/run/containerd/runc"] if runtime == STOCK else []
    job = start_job(runtime=runtime, options=options)  # ctr 1.7 wants some to restore it
    before = job.next_report()
    job.checkpoint_container("local/saved:1")
    go_on(before, job.next_report())
    job.end()
    assert board.owners() == {}
    job.restore_container("local/saved:1")
    go_on(before, job.next_report())


@EVERYWHERE
@pytest.mark.cell("`nerdctl checkpoint create`, `start --checkpoint`")
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
    job.ctr("task", "delete", job.name)
    assert board.owners() == {}
    nerdctl.start(job, saved)
    go_on(before, job.next_report())
    if runtime == STOCK:  # the file system is as it was when the memory was saved
        counts = [report.counter for report in job.reports()]
        assert counts == list(range(len(counts)))
