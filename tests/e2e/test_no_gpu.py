"""Containers without a CUDA process: the same path without the CUDA steps, the stock shim's
refusals no later than it gives them; and a configuration that nothing starts on."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import pytest

from shim import announced, places
from shim.ttrpc import StatusError
from tests.e2e.faults import Direct
from tests.e2e.gpu import CONFIG, GRIT, STOCK, Job, configure, go_on, gpu_of, kit_binds, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]

RUNS = "/run/criu-runs"
COUNTING_CRIU = f"""\
#!/bin/sh
echo "$@" >> {RUNS}
exec /usr/sbin/criu "$@"
"""


@pytest.fixture(scope="module", params=["13", "forky"])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A node whose CRIU, wherever it is started, leaves a line in RUNS."""
    from tests.e2e.conftest import running

    cgroup = {"13": "v1", "forky": "v2"}[request.param]
    with running(request.param, cgroup=cgroup, binds=kit_binds()) as node:
        criu = node.path("/usr/local/sbin/criu")
        criu.write_text(COUNTING_CRIU)
        criu.chmod(0o755)
        yield node, gpu_of(node, capacity=1 << 20)


@pytest.fixture
def started(place: Place) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def start(*words: str, runtime: str = GRIT) -> Job:
        jobs.append(Job(*place, "job", "--kind", "cpu", *words, runtime=runtime))
        return jobs[-1].run()

    yield start
    for job in jobs:
        job.end()
        job.remove_checkpoints()


def criu_runs(node: Node) -> list[str]:
    """How CRIU has been started since the last question."""
    runs = node.path(RUNS)
    lines = runs.read_text().splitlines() if runs.exists() else []
    runs.unlink(missing_ok=True)
    return lines


def test_dumped_and_restored(place: Place, started: Callable[..., Job]) -> None:
    """No driver is asked, nor is there one: no libcuda is where the shim looks."""
    node, _ = place
    configure(node, libcuda="/nowhere/libcuda.so.1")
    job = started()
    before = job.next_report()
    job.checkpoint_container("local/cpu:1")
    go_on(before, job.next_report())
    job.end()
    go_on(before, job.restore_container("local/cpu:1").next_report())
    images = "/var/tmp/cpu"
    if node.containerd_version >= (2, 0):  # ctr 1.7 passes the path on for runc's name only
        job.remove_checkpoints()
        job.checkpoint_task(images, "--exit")
        until("the container's end", lambda: job.status() == "STOPPED")
        manifest = json.loads(node.path(f"{images}/grit.json").read_text())
        assert manifest["engine"] == "none"
        assert manifest["cuda_processes"] == []
        shutil.rmtree(node.path(images))
    assert 'msg="GPU suspended"' not in node.containerd_log()


def test_paused_once_more_by_another_client(
    place: Place, started: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each had announced a checkpoint of its own, and neither comes: nothing is left of either."""
    node, _ = place
    configure(node)
    monkeypatch.setattr(places, "ANNOUNCED", str(node.path(places.ANNOUNCED)))
    beside = node.path("/var/tmp/announced")
    beside.mkdir()
    job = started()
    with Direct(job) as shim:
        with announced.announcing("default", job.name, "/var/tmp/announced/one"):
            shim.call("Pause")
        assert list(beside.iterdir())
        with (
            announced.announcing("default", job.name, "/var/tmp/announced/other"),
            pytest.raises(StatusError),
        ):
            shim.call("Pause")
        shim.call("Resume")
    assert list(beside.iterdir()) == []
    beside.rmdir()
    assert job.status() == "RUNNING"


def test_no_slower_to_fail_than_stock(place: Place, started: Callable[..., Job]) -> None:
    """CRIU refuses held file locks, which the plain `ctr task checkpoint` does not ask for. Grit
    starts CRIU no more often than runc does on the way there, waits for nothing, tries nothing
    twice, and names the reason that the stock shim leaves in a file."""
    node, _ = place
    configure(node)
    told, runs = {}, {}
    for runtime in (STOCK, GRIT):
        job = started("--flock", "/held", runtime=runtime)
        criu_runs(node)
        before = job.next_report()
        done = job.ctr("task", "checkpoint", "job", check=False)
        assert done.returncode != 0
        assert job.status() == "RUNNING"
        go_on(before, job.next_report())
        told[runtime], runs[runtime] = done.stderr, criu_runs(node)
        job.end()
    assert len(runs[GRIT]) <= len(runs[STOCK])
    assert "a process holds file locks" in told[GRIT]
    assert "the container runs on" in told[GRIT] or "stays paused" in told[GRIT]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[grit]\n\nlock_timout = 3\n",
            "line 3: [grit] lock_timout: is not a known key; did you mean lock_timeout?",
        ),
        (
            'SystemdCgroup = "yes"\n',
            'line 1: SystemdCgroup: is "yes"; it must be true or false',
        ),
        (
            '[grit]\ntcp = "maybe"\n',
            'line 2: [grit] tcp: is "maybe"; it must be one of "refuse", "established", "close"',
        ),
    ],
)
def test_a_wrong_configuration_starts_nothing(place: Place, text: str, message: str) -> None:
    node, board = place
    before = node.leaks()
    node.path(CONFIG).write_text(text)
    job = Job(node, board, "job")
    done = job.try_run()
    assert done.returncode != 0
    assert f"{CONFIG}, {message}" in done.stderr
    assert job.status() == ""
    job.ctr("container", "delete", "job", check=False)
    until("an end without leaks", lambda: not node.leaks() - before)
