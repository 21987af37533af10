"""containerd, the shims and the client ended at each moment of a checkpoint: a container whose
containerd returns lives on with its GPU; one whose shim has died ends, leaving nothing behind."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.faults import (
    alive_and_well,
    checkpointing,
    copy_under_way,
    criu_halted,
    halted,
    lock_under_way,
    published,
    restore_under_way,
    start,
)
from tests.e2e.gpu import ENVIRONMENT_OF_GRIT, configure, go_on, until

if TYPE_CHECKING:
    from tests.e2e.faults import Place, StartJob
    from tests.e2e.gpu import Job
    from tests.nodes.node import Node

SLOW = "speed=8000000"  # bytes/s: half a second for the job's 4 MiB
INNER = "containerd-shim-runc-v2"
OUTER = "containerd-shim-grit-v1"


def end_containerd(node: Node, sig: signal.Signals) -> None:
    if sig == signal.SIGTERM:
        node.stop_containerd()
    else:
        node.kill_containerd()


def restart_containerd(node: Node, sig: signal.Signals) -> None:
    end_containerd(node, sig)
    node.start_containerd(env=ENVIRONMENT_OF_GRIT)


@pytest.mark.parametrize(
    ("moment", "sig"),
    [
        ("lock", signal.SIGTERM),
        ("copy", signal.SIGKILL),
        ("dump", signal.SIGTERM),
        ("dump", signal.SIGKILL),
        ("dumped", signal.SIGKILL),
        ("restore", signal.SIGTERM),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
def test_containerd_restarted(
    gpu_node: Place, start_job: StartJob, images: str, moment: str, sig: signal.Signals
) -> None:
    """Whoever wanted the checkpoint has gone with containerd, and no Resume comes: the shim itself
    brings the attempt to a good end, and the container back."""
    node, board = gpu_node
    configure(node)
    job, before = start(start_job, node)
    board.fault({"lock": "lock=never", "copy": SLOW, "restore": SLOW}.get(moment, ""))
    client = checkpointing(job, images)
    dumped = moment in ("dump", "dumped", "restore")
    match moment:
        case "lock":
            lock_under_way(job)
            restart_containerd(node, sig)
        case "copy":
            copy_under_way(job)
            restart_containerd(node, sig)
        case "dump":
            criu = criu_halted(job)
            restart_containerd(node, sig)
            assert job.status() == "PAUSED"
            os.kill(criu, signal.SIGCONT)
            published(node, images)
        case "dumped":  # the answer is on its way to a containerd that will never read it
            criu = criu_halted(job)
            with halted(node, "containerd"):
                os.kill(criu, signal.SIGCONT)
                published(node, images)
                end_containerd(node, sig)
            node.start_containerd(env=ENVIRONMENT_OF_GRIT)
        case "restore":
            restore_under_way(job)
            restart_containerd(node, sig)
    board.end_faults()
    client.communicate(timeout=60)
    alive_and_well(job, before, images, dumped=dumped)


def test_paused_stays_paused(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, _ = gpu_node
    configure(node)
    job, before = start(start_job, node)
    job.ctr("task", "pause", job.name)
    written = len(job.reports())
    restart_containerd(node, signal.SIGKILL)
    assert job.status() == "PAUSED"
    assert len(job.reports()) == written
    assert job.gpu.owners() == {}
    job.ctr("task", "resume", job.name)
    alive_and_well(job, before, images)


def gone(job: Job, init: int) -> None:
    until("the container's end", lambda: not os.path.exists(f"/proc/{init}"))
    until("STOPPED or no task", lambda: job.status() in ("STOPPED", ""))


def test_inner_shim_killed(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """What is left of it is looked for at the end of every test, by `start_job`."""
    node, _ = gpu_node
    configure(node)
    job, _ = start(start_job, node)
    init = job.pid()
    client = checkpointing(job, images)
    criu = criu_halted(job)
    (inner,) = node.pids(INNER)
    node.run(["kill", "-9", str(inner)])
    os.kill(criu, signal.SIGCONT)
    client.communicate(timeout=60)
    assert client.returncode != 0
    gone(job, init)


@pytest.mark.parametrize("containerd", ["up", "down"])
def test_outer_shim_killed(
    gpu_node: Place, start_job: StartJob, images: str, containerd: str
) -> None:
    node, _ = gpu_node
    configure(node)
    job, _ = start(start_job, node)
    init = job.pid()
    client = checkpointing(job, images)
    criu = criu_halted(job)
    if containerd == "down":
        end_containerd(node, signal.SIGKILL)
    node.run(["kill", "-9", str(outer_shim(node))])
    if containerd == "down":
        node.start_containerd(env=ENVIRONMENT_OF_GRIT)
    os.kill(criu, signal.SIGCONT)
    client.communicate(timeout=60)
    assert client.returncode != 0
    gone(job, init)


def outer_shim(node: Node) -> int:
    """Its name may be the stock shim's, but it is a script of Python's."""
    (pid,) = [
        pid
        for pid, words in node.processes().items()
        if pid not in node.pids(INNER) and any(os.path.basename(w) in (OUTER, INNER) for w in words)
    ]
    return pid


def test_client_killed(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """Nobody tells the shim, so the container stays paused, as under the stock shim (facts 2.1).
    The log says what to do about it."""
    node, _ = gpu_node
    configure(node)
    job, before = start(start_job, node)
    client = checkpointing(job, images)
    criu = criu_halted(job)
    client.kill()
    client.communicate()
    os.kill(criu, signal.SIGCONT)
    published(node, images)
    assert job.status() == "PAUSED"
    remedy = f"ctr -n default task resume {job.name}"
    until("the way out in the log", lambda: remedy in node.containerd_log())
    node.run(remedy.split())
    go_on(before, job.next_report())
    alive_and_well(job, before, images, dumped=True)
