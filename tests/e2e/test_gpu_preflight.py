"""What is refused before anything is done to a container, with every reason at once; and that a
dump without the device memory is never published."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import configure, go_on, honouring
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_failures import fails, tmpfs, works
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

MIB = 1 << 20


def lock_is_never_asked_for(board: SimGpu) -> None:
    """From now on whoever locks a process waits for ever: a refusal must come before that."""
    board.fault("lock=hang")


@on_forky
@pytest.mark.parametrize(("mode", "words"), [("mig", "MIG instance of GPU-"), ("mps", "of MPS")])
def test_what_the_driver_cannot_checkpoint_is_refused_before_the_lock(
    gpu_node: Place, start_job: StartJob, images: str, engine: str, mode: str, words: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    with board.mode(mode):
        lock_is_never_asked_for(board)
        paused = job.ctr("task", "pause", job.name, check=False)
        board.end_faults()
        told = fails(job, images)
    for said in (paused.stderr, told):
        assert paused.returncode != 0
        assert "nothing was done to it, it runs on" in said
        assert f"pid {job.node_pid()} (simgpu-workload) is " in said
        assert words in said
    works(job, images)


def test_io_uring_is_refused_by_name(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, _ = gpu_node
    configure(node)
    job = start_job("--io-uring", runtime=honouring(node))
    told = fails(job, images)
    assert f"pid {job.node_pid()} (simgpu-workload) uses io_uring" in told
    assert "nothing was written; the container stays paused" in told
    job.ctr("task", "pause", job.name)  # which gives a GPU back all the same
    job.ctr("task", "resume", job.name)


@on_forky
def test_every_reason_is_told_at_once(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, board = gpu_node
    configure(node, criu="/nowhere/criu")
    job = start_job("--io-uring", runtime=honouring(node))
    with board.mode("mig"):
        told = fails(job, images)
    for reason in ("(1) pid", "MIG instance", "(2) CRIU cannot be used", "(3) pid", "io_uring"):
        assert reason in told


@on_forky
def test_images_that_cannot_fit_are_refused_before_a_byte_is_written(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    job = start_job("--cpu-bytes", str(6 * MIB), runtime=honouring(node))
    with tmpfs(node, images, "2m"):
        told = fails(job, images)
        assert "the images need at least " in told
        assert "2.0 MiB are free in " in told
        assert "free space, or name another directory" in told


def test_the_manifest_says_where_the_device_memory_is(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    works(job, images)
    written = json.loads(node.path(f"{images}/grit.json").read_text())
    (process,) = written["cuda_processes"]
    assert (process["before"], process["state"]) == ("running", "checkpointed")
    assert process["held_bytes"] == process["device_bytes"] == process["image_bytes"] == 4 * MIB
    assert process["gpus"] == {f"GPU-{simgpu.SimGpu.uuid(0)}": 4 * MIB}
    start, end = process["region"]
    assert end - start == 4 * MIB
    assert written["files"][process["image"]]["size"] >= 4 * MIB


def test_a_dump_without_the_device_memory_is_not_published(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """The driver says that it has copied, but not into memory that CRIU writes."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    with board.faulty("checkpoint=hidden"):
        told = fails(job, images)
    assert "the images do not hold the device memory" in told
    assert f"pid {job.node_pid()} (simgpu-workload): NVML said 4.0 MiB in use" in told
    assert "no memory appeared in the process" in told
    before = job.next_report()
    works(job, images)
    go_on(before, job.next_report())
