"""The stock shim and grit side by side on the same containers: what the stock path refuses, or
loses without a word, grit carries over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import (
    GRIT,
    NO_GPU_CHECK,
    STOCK,
    Job,
    configure,
    go_on,
    gpu_of,
    kit_binds,
    until,
)
from tests.nodes.installed import CUDA_PLUGIN
from tests.nodes.installed import ENVIRONMENT as INSTALLED
from tests.nodes.node import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]

RUNC_CONF = "/etc/criu/runc.conf"


@pytest.fixture(scope="module", params=["13", "forky"])
def stock_place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A node set up for the stock path as well as can be: CRIU with its CUDA plugin, and a
    cuda-checkpoint (ours stands in for NVIDIA's) on containerd's PATH."""
    from tests.e2e.conftest import running

    env = {**NO_GPU_CHECK, "PATH": f"{ENVIRONMENT['PATH']}:{INSTALLED}/libexec"}
    cgroup = {"13": "v1", "forky": "v2"}[request.param]
    with running(request.param, cgroup=cgroup, binds=kit_binds(), env=env) as node:
        node.path(RUNC_CONF).parent.mkdir(exist_ok=True)
        yield node, gpu_of(node, capacity=16 << 20)


@pytest.fixture
def with_plugin(stock_place: Place) -> Iterator[None]:
    """runc's CRIU loads the CUDA plugin on this node."""
    conf = stock_place[0].path(RUNC_CONF)
    conf.write_text(f"libdir {CUDA_PLUGIN}\n")
    yield
    conf.unlink()


@pytest.fixture
def started(stock_place: Place) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*words: str, runtime: str) -> Job:
        jobs.append(Job(*stock_place, "job", *words, runtime=runtime))
        return jobs[-1].run()

    yield start
    for job in jobs:
        job.end()
        job.remove_checkpoints()
    until("the GPU free", lambda: stock_place[1].owners() == {})


def dump_log(job: Job) -> str:
    """The errors in CRIU's log, which the stock shim only names."""
    lines = (job.rootfs().parent / "criu-dump.log").read_text().splitlines()
    return "\n".join(line for line in lines if "Error" in line)


@pytest.mark.usefixtures("with_plugin")
def test_stock_shim_and_a_frozen_cuda_container(
    stock_place: Place, started: Callable[..., Job]
) -> None:
    """CRIU 4.1 turns to the CUDA processes while the container is frozen, when none can answer;
    4.2 thaws it before (seize.c), and succeeds where the plugin is set up."""
    node, _ = stock_place
    job = started(runtime=STOCK)
    done = job.ctr("task", "checkpoint", "job", check=False)
    if node.name == "13":
        assert done.returncode != 0
        assert "cuda_plugin" in dump_log(job)
    else:
        assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("with_plugin")
def test_grit_dumps_it(stock_place: Place, started: Callable[..., Job], engine: str) -> None:
    configure(stock_place[0], engine=engine)
    job = started(runtime=GRIT)
    before = job.next_report()
    job.checkpoint_container("local/gpu:1")
    go_on(before, job.next_report())
    job.end()
    go_on(before, job.restore_container("local/gpu:1").next_report())


def test_file_locks(stock_place: Place, started: Callable[..., Job]) -> None:
    """The stock restore loses them; the job goes on and does not know."""
    node, _ = stock_place
    configure(node, file_locks=True)
    words = ["--kind", "cpu", "--flock", "/held", "--fcntl-lock", "/held-too"]
    kept = {}
    for runtime in (STOCK, GRIT):
        job = started(*words, runtime=runtime)
        assert job.next_report().flock
        job.checkpoint_container("local/locks:1")
        job.end()
        job.restore_container("local/locks:1")
        lines = len(job.reports())
        until("a report", lambda job=job, lines=lines: len(job.reports()) > lines + 1)
        last = job.reports()[-1]
        kept[runtime] = (last.flock, last.fcntl)
        job.end()
    assert kept == {STOCK: (False, False), GRIT: (True, True)}


def test_open_connections(stock_place: Place, started: Callable[..., Job]) -> None:
    node, _ = stock_place
    if node.name == "13":
        pytest.skip("CRIU 4.1 dumps no internet socket on Linux 6.16 and later (criu #2705)")
    configure(node, tcp="established")
    job = started("--kind", "cpu", "--tcp", runtime=STOCK)
    refused = job.ctr("task", "checkpoint", "job", check=False)
    assert refused.returncode != 0
    assert "Connected TCP socket" in dump_log(job)
    job.end()

    job = started("--tcp", runtime=GRIT)
    before = job.next_report()
    job.checkpoint_container("local/tcp:1")
    go_on(before, job.next_report())
    job.end()
    after = job.restore_container("local/tcp:1").next_report()
    go_on(before, after)
    assert after.tcp


@pytest.mark.parametrize("kind", ["cpu", "ctx"])
def test_criu_service(stock_place: Place, started: Callable[..., Job], kind: str) -> None:
    """CRIU through the socket of a running service, for a job without and with a GPU."""
    node, _ = stock_place
    socket = "/run/criu-service.sock"
    configure(node, engine="driver", criu_service=socket)
    service = node.popen(["criu", "service", "--address", socket, "-o", "/dev/null"])
    try:
        until("the service", lambda: node.path(socket).exists())
        job = started("--kind", kind, runtime=GRIT)
        before = job.next_report()
        job.checkpoint_container("local/service:1")
        go_on(before, job.next_report())
        job.end()
        go_on(before, job.restore_container("local/service:1").next_report())
    finally:
        service.terminate()
        service.wait()
        node.path(socket).unlink(missing_ok=True)
