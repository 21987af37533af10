"""The CUDA helper killed, and a driver that hangs, at each step: the client is told, or a new
helper mends it; no process is left locked, and the shim answers others meanwhile."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.faults import (
    alive_and_well,
    answers_meanwhile,
    checkpointing,
    copy_under_way,
    helper_calling,
    lock_under_way,
    restore_under_way,
    start,
    told,
)
from tests.e2e.gpu import configure, until
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from tests.e2e.faults import Place, StartJob
    from tests.nodes.node import Node

SLOW = "speed=8000000"  # bytes/s: half a second for the job's 4 MiB


def kill_helper(node: Node) -> None:
    node.run(["kill", f"-{int(signal.SIGKILL)}", str(helper_calling(node))])


@pytest.mark.parametrize("step", ["lock", "copy"])
def test_helper_killed(gpu_node: Place, start_job: StartJob, images: str, step: str) -> None:
    node, board = gpu_node
    configure(node)
    job, before = start(start_job, node)
    board.fault({"lock": "lock=never", "copy": SLOW}[step])
    client = checkpointing(job, images)
    {"lock": lock_under_way, "copy": copy_under_way}[step](job)
    kill_helper(node)
    board.end_faults()
    why = told(client)
    call = {"lock": "lock", "copy": "checkpoint"}[step]
    assert f"was killed or crashed during the driver's {call} call" in why
    assert f"pid {job.node_pid()} (simgpu-workload) running again" in why
    alive_and_well(job, before, images)


def test_helper_killed_while_the_gpu_comes_back(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """The checkpoint is good by then, and clients drop a Resume's error: the shim must mend it."""
    node, board = gpu_node
    configure(node)
    job, before = start(start_job, node)
    board.fault(SLOW)
    client = checkpointing(job, images)
    restore_under_way(job)
    kill_helper(node)
    board.end_faults()
    client.communicate(timeout=60)
    assert client.returncode == 0
    alive_and_well(job, before, images, dumped=True)


@pytest.mark.parametrize("step", ["lock", "checkpoint"])
def test_driver_hangs(gpu_node: Place, start_job: StartJob, images: str, step: str) -> None:
    node, board = gpu_node
    configure(node, lock_timeout=1, dump_timeout=1)
    job, before = start(start_job, node)
    board.fault(f"{step}=hang")
    client = checkpointing(job, images)
    hung = helper_calling(node)
    answers_meanwhile(job)
    until("another helper", lambda: helper_calling(node) != hung)
    answers_meanwhile(job)
    board.end_faults()
    why = told(client)
    assert f"pid {job.node_pid()}: the driver's {step} call did not come back within" in why
    assert f"pid {job.node_pid()} (simgpu-workload) running again" in why
    configure(node)
    alive_and_well(job, before, images)


def test_driver_hangs_while_the_gpu_comes_back(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """The log says so, and another Resume takes up where the first was left."""
    node, board = gpu_node
    configure(node, dump_timeout=1)
    job, before = start(start_job, node)
    board.fault("restore=hang")
    client = checkpointing(job, images)
    until("the images", node.path(f"{images}/grit.json").exists)
    helper_calling(node)
    answers_meanwhile(job)
    client.communicate(timeout=60)
    log = node.containerd_log()
    assert f"pid {job.node_pid()}: the driver's restore call did not come back within 1.0 s" in log
    board.end_faults()
    assert job.gpu.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.CHECKPOINTED)
    job.ctr("task", "resume", job.name)
    alive_and_well(job, before, images, dumped=True)
