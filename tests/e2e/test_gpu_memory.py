"""Containers with a memory limit that the copy of their device memory does not fit under. The
simulated driver's copy is charged to the container, as the real one's is, and the kernel kills
who goes over: the checkpoint is refused, or the limit raised meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import LIBRARIES, configure, go_on, honouring, until
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

MIB = 1 << 20
DEVICE_BYTES = 14 * MIB  # which the workload holds once more itself, to compare with
LIMIT = 24 * MIB


@pytest.fixture(scope="module", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[tuple[Node, SimGpu]]:
    """As everywhere, but always with cgroup v1: hosts that have both keep memory there."""
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(request.param, cgroup="v1", binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        yield node, gpu.gpu_of(node, capacity=16 * MIB)


@pytest.fixture
def limited(gpu_node: Place, start_job: StartJob) -> StartJob:
    """Starts a job that lives within its limit, but not with a copy of its device memory."""
    node, _ = gpu_node

    def start(**settings: str) -> Job:
        configure(node, **settings)
        words = ("--bytes", str(DEVICE_BYTES))
        return start_job(*words, runtime=honouring(node), options=[f"--memory-limit={LIMIT}"])

    return start


def memory(job: Job) -> Path:
    return job.node.path(f"/sys/fs/cgroup/memory/default/{job.name}")


def limits(job: Job) -> list[int]:
    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    return [int((memory(job) / name).read_text()) for name in names]


def refused(job: Job, images: str) -> str:
    """What the client is told; the job is alive, its GPU running, its limits what they were."""
    before, allowed = job.next_report(), limits(job)
    done = job.checkpoint_task(images, check=False)
    assert done.returncode != 0
    assert job.status() == "RUNNING"
    assert job.gpu.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    go_on(before, job.next_report())
    assert limits(job) == allowed
    assert f"pid {job.node_pid()}" in done.stderr
    assert "78.0 MiB on the host" in done.stderr
    return done.stderr


def test_refused(limited: StartJob, images: str, engine: str) -> None:
    job = limited(engine=engine)
    told = refused(job, images)
    assert f"default/{job.name}/memory.limit_in_bytes is 24.0 MiB" in told
    # CRIU's plugin copies as it dumps, so that the Pause before was granted.
    assert {"driver": "nothing was done to it", "plugin": "nothing was written"}[engine] in told
    assert 'memory = "raise"' in told


def test_raised_and_put_back(limited: StartJob, images: str, engine: str) -> None:
    job = limited(engine=engine, memory="raise")
    before, allowed = job.next_report(), limits(job)
    job.checkpoint_task(images)
    go_on(before, job.next_report())
    assert limits(job) == allowed


def test_raised_from_pause_to_resume(limited: StartJob) -> None:
    job = limited(engine="driver", memory="raise")
    allowed = limits(job)
    job.ctr("task", "pause", job.name)
    assert limits(job)[0] > LIMIT + DEVICE_BYTES
    job.ctr("task", "resume", job.name)
    assert limits(job) == allowed


def dumped(job: Job, images: str) -> None:
    """Its checkpoint, with the files that go with it, and its end."""
    job.checkpoint_task(images, "--exit")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()


def restore_limited(start_job: StartJob, images: str, runtime: str) -> Job:
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    options = [f"--memory-limit={LIMIT}", note]
    return start_job(runtime=runtime, options=options, run=False)


def test_restored_under_the_same_limit(
    limited: StartJob, start_job: StartJob, images: str, engine: str
) -> None:
    """The copy comes back in memory of the container before it goes to the GPU."""
    job = limited(engine=engine, memory="raise")
    before, allowed = job.next_report(), limits(job)
    dumped(job, images)
    restored = restore_limited(start_job, images, job.runtime).run()
    go_on(before, restored.next_report())
    assert limits(restored) == allowed


def test_a_restore_that_does_not_fit_is_refused(
    limited: StartJob, start_job: StartJob, images: str
) -> None:
    job = limited(engine="driver", memory="raise")
    dumped(job, images)
    configure(job.node, engine="driver")
    restored = restore_limited(start_job, images, job.runtime)
    done = restored.try_run()
    assert done.returncode != 0
    assert "its memory limit is 24.0 MiB" in done.stderr
    assert restored.status() == ""


def test_put_back_after_a_failure(
    gpu_node: Place, limited: StartJob, images: str, engine: str
) -> None:
    _, board = gpu_node
    job = limited(engine=engine, memory="raise")
    before, allowed = job.next_report(), limits(job)
    with board.faulty("checkpoint=304"):
        assert job.checkpoint_task(images, check=False).returncode != 0
    go_on(before, job.next_report())
    assert limits(job) == allowed


def test_a_limit_above_the_container_is_not_raised(limited: StartJob, images: str) -> None:
    job = limited(engine="driver", memory="raise")
    above = memory(job).parent / "memory.limit_in_bytes"
    above.write_text(str(64 * MIB))
    told = refused(job, images)
    assert above.read_text() == f"{64 * MIB}\n"
    above.write_text("-1")
    assert "/default/memory.limit_in_bytes is 64.0 MiB" in told
    assert "not ours to raise" in told


def test_what_is_not_known_is_not_refused_and_the_harm_is_real(
    gpu_node: Place, limited: StartJob, images: str
) -> None:
    """The check's reason, shown where it cannot be made: on a node without NVML."""
    node, _ = gpu_node
    job = limited(engine="driver")
    nvml = node.path(f"{LIBRARIES}/libnvidia-ml.so.1")
    target = nvml.readlink()
    nvml.unlink()
    try:
        assert job.checkpoint_task(images, check=False).returncode != 0
    finally:
        nvml.symlink_to(target)
    until("the kernel's kill", lambda: job.status() == "STOPPED")
    assert "oom_kill 1" in (memory(job) / "memory.oom_control").read_text()
    assert "device memory of a process is not known" in node.containerd_log()
