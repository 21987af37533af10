"""The stock shim and grit side by side on the same containers: what the stock path refuses, or
loses without a word, grit carries over."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

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

    def start(*words: str, **options: Any) -> Job:
        jobs.append(Job(*stock_place, "job", *words, **options))
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


LOCKS = ["--flock", "/held", "--fcntl-lock", "/held-too"]


def locks_after_restore(job: Job) -> tuple[bool, bool]:
    """Whether the job still holds its flock and its fcntl lock; it does not notice itself."""
    assert job.next_report().flock
    job.checkpoint_container("local/locks:1")
    job.end()
    job.restore_container("local/locks:1")
    lines = len(job.reports())
    until("a report", lambda: len(job.reports()) > lines + 1)
    last = job.reports()[-1]
    return last.flock, last.fcntl


def test_stock_loses_file_locks(started: Callable[..., Job]) -> None:
    """The stock restore drops them without a word."""
    job = started("--kind", "cpu", *LOCKS, runtime=STOCK)
    assert locks_after_restore(job) == (False, False)


def test_file_locks(stock_place: Place, started: Callable[..., Job], engine: str) -> None:
    configure(stock_place[0], engine=engine, file_locks=True)
    job = started(*LOCKS, runtime=GRIT)
    before = job.next_report()
    assert locks_after_restore(job) == (True, True)
    go_on(before, job.next_report())


@pytest.fixture
def network(stock_place: Place) -> Iterator[str]:
    """ctr's option for a network namespace made for the container by somebody else, as a pod's
    is. One of runc's own making comes back empty, with its loopback down, under any shim."""
    node, _ = stock_place
    node.run(["ip", "netns", "add", "pod"])
    node.run(["ip", "-n", "pod", "link", "set", "lo", "up"])
    yield "--with-ns=network:/run/netns/pod"
    node.run(["ip", "netns", "delete", "pod"])


def test_stock_refuses_open_connections(started: Callable[..., Job], network: str) -> None:
    job = started("--kind", "cpu", "--tcp", runtime=STOCK, options=[network])
    refused = job.ctr("task", "checkpoint", "job", check=False)
    assert refused.returncode != 0
    assert "Connected TCP socket" in dump_log(job)


def no_sockets(node: Node) -> bool:
    """CRIU 4.1 dumps no internet socket on Linux 6.16 and later (criu #2705)."""
    kernel = tuple(int(word) for word in os.uname().release.split(".")[:2])
    return node.name == "13" and kernel >= (6, 16)


def test_open_connections(
    stock_place: Place, started: Callable[..., Job], network: str, engine: str
) -> None:
    node, _ = stock_place
    configure(node, engine=engine, tcp="established")
    job = started("--tcp", runtime=GRIT, options=[network])
    before = job.next_report()
    if no_sockets(node):
        refused = job.ctr("task", "checkpoint", "job", check=False)
        assert refused.returncode != 0
        assert "this CRIU cannot dump network sockets on kernels from 6.16" in refused.stderr
        go_on(before, job.next_report())
        return
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
