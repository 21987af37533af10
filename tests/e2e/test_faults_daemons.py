"""containerd, the shims and the client ended at each moment of a checkpoint: a container whose
containerd returns lives on with its GPU; one whose shim has died ends, leaving nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
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
    told,
)
from tests.e2e.gpu import ENVIRONMENT_OF_GRIT, configure, go_on, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.faults import Place, StartJob
    from tests.e2e.gpu import Job
    from tests.nodes.node import Node, Process

SLOW = "speed=8000000"  # bytes/s: half a second for the job's 4 MiB
INNER = "containerd-shim-runc-v2"
OUTER = "containerd-shim-grit-v1"


@contextlib.contextmanager
def down(node: Node, sig: signal.Signals) -> Iterator[None]:
    """containerd is not there meanwhile."""
    if sig == signal.SIGTERM:
        node.stop_containerd()
    else:
        node.kill_containerd()
    try:
        yield
    finally:
        node.start_containerd(env=ENVIRONMENT_OF_GRIT)


def restart_containerd(node: Node, sig: signal.Signals) -> None:
    with down(node, sig):
        pass


@pytest.mark.parametrize(
    ("engine", "moment", "sig"),
    [
        ("driver", "lock", signal.SIGTERM),
        ("driver", "copy", signal.SIGKILL),
        ("driver", "dump", signal.SIGTERM),
        ("driver", "dump", signal.SIGKILL),
        ("plugin", "dump", signal.SIGKILL),
        ("driver", "dumped", signal.SIGKILL),
        ("driver", "restore", signal.SIGTERM),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else value,
)
def test_containerd_restarted(
    gpu_node: Place,
    start_job: StartJob,
    images: str,
    engine: str,
    moment: str,
    sig: signal.Signals,
) -> None:
    """Whoever wanted the checkpoint has gone with containerd, and no Resume comes: the shim itself
    brings the attempt to a good end, and the container back. A containerd that ends in good order
    may let its client's Resume through, which gives a dump under way up."""
    node, board = gpu_node
    configure(node, engine=engine)
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
            os.kill(criu, signal.SIGCONT)
            until("CRIU's end", lambda: not node.pids("criu"))
            dumped = node.path(f"{images}/grit.json").exists()
            assert dumped or sig == signal.SIGTERM
        case "dumped":  # the answer is on its way to a containerd that will never read it
            criu = criu_halted(job)
            with halted(node, "containerd"):
                os.kill(criu, signal.SIGCONT)
                published(node, images)
                restart_containerd(node, sig)
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


def gone(job: Job, client: Process, init: int) -> None:
    """The container has ended, the client was told, and CRIU does not stand in the way, although it
    has been stopped. All that is left is looked for at the end of every test, by `start_job`; here
    goes what `ctr run` made and nobody removes once containerd has given a shim up, the stock one
    too: the directory of the task's stdio."""
    until("the container's end", lambda: not os.path.exists(f"/proc/{init}"))
    until("STOPPED or no task", lambda: job.status() in ("STOPPED", ""))
    told(client)
    if not job.status():
        (stdio,) = job.node.path("/run/containerd/fifo").iterdir()
        shutil.rmtree(stdio)


def again(start_job: StartJob, job: Job, images: str) -> None:
    """The name and the image directory are free, also of what the failed attempt left there."""
    job.end()
    fresh, before = start(start_job, job.node)
    fresh.checkpoint_task(images)
    alive_and_well(fresh, before, images, dumped=True)


def test_inner_shim_killed(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, _ = gpu_node
    configure(node)
    job, _ = start(start_job, node)
    init = job.pid()
    client = checkpointing(job, images)
    criu_halted(job)
    (inner,) = node.pids(INNER)
    node.run(["kill", "-9", str(inner)])
    gone(job, client, init)
    again(start_job, job, images)


@pytest.mark.parametrize(
    ("engine", "which", "containerd"),
    [
        ("driver", "outer", "up"),
        ("driver", "outer", "down"),
        ("driver", "both", "up"),
        ("plugin", "outer", "up"),
    ],
)
def test_outer_shim_killed(
    gpu_node: Place, start_job: StartJob, images: str, engine: str, which: str, containerd: str
) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    job, _ = start(start_job, node)
    init = job.pid()
    client = checkpointing(job, images)
    criu_halted(job)
    shims = [outer_shim(node), *(node.pids(INNER) if which == "both" else [])]
    with down(node, signal.SIGKILL) if containerd == "down" else contextlib.nullcontext():
        node.run(["kill", "-9", *map(str, shims)])
    gone(job, client, init)
    again(start_job, job, images)


@pytest.mark.parametrize("shim", ["outer", "inner"])
def test_shim_killed_while_the_gpu_is_copied(
    gpu_node: Place, start_job: StartJob, images: str, shim: str
) -> None:
    node, board = gpu_node
    configure(node)
    job, _ = start(start_job, node)
    init = job.pid()
    board.fault(SLOW)
    client = checkpointing(job, images)
    copy_under_way(job)
    node.run(["kill", "-9", str(outer_shim(node) if shim == "outer" else node.pids(INNER)[0])])
    gone(job, client, init)
    board.end_faults()
    again(start_job, job, images)


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
