"""The shim's daemon killed right before each phase of a checkpoint and of a restore: containerd
ends its container, and what would outlive it is ended by the journal. And the watchdog, which
resumes a container whose client has been killed. docs/reliability.md is the table of these."""

from __future__ import annotations

import itertools
import shutil
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from shim import failpoint
from tests.e2e.failpoints import held
from tests.e2e.failpoints import told as told_to
from tests.e2e.faults import alive_and_well, checkpointing, published
from tests.e2e.gpu import configure, go_on, honouring, restored_by_annotation, until
from tests.e2e.marks import on_13, on_forky
from tests.e2e.test_faults_daemons import restart_containerd
from tests.e2e.test_gpu_checkpoint import diff_beside

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.e2e.faults import Place, StartJob
    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import Report

WHOLE = ("let-go", "thaw", "refill", "give-back")
"""When the checkpoint lies under its final name."""

NOTED = {
    "lock": "",
    "copy": "locking",
    "freeze": "suspended",
    "look-again": "freezing",
    "lane": "beginning a checkpoint",
    "drop": "beginning a checkpoint",
    "dump": "dropping device memory that is in files",
    "publish": "dumping",
    "let-go": "publishing",
    "thaw": "paused",
    "refill": "thawing",
    "give-back": "filling device memory in again",
    "verify": "",
    "create": "",
    "fill": "",
    "restore": "",
    "restore-gpu": "restoring",
    "restored": "restoring the GPU",
}
"""The phase in the journal while the next one is yet to begin; "" without a journal."""


def journals(node: Node) -> list[str]:
    return [path.name for path in node.path("/run/containerd/grit").glob("*/journal/*")]


def killed_at(node: Node, name: str, daemon: int, job: Job) -> None:
    """Kills the daemon that stands at this place; containerd ends its container, and its log has
    what it was ended in the middle of."""
    assert journals(node) == ([job.name] if NOTED[name] else [])
    mark = len(node.containerd_log())
    node.run(["kill", "-9", str(daemon)])
    until("the task's end", lambda: job.status() == "STOPPED" or not job.rootfs().parent.exists())
    if NOTED[name]:
        said = f"ended with its shim's daemon, {NOTED[name]};"
        until("the word in the log", lambda: said in node.containerd_log()[mark:])


def places(names: Sequence[str]) -> pytest.MarkDecorator:
    """The failpoints, each on one of the nodes, in turn; by the scope, each node is made once."""
    nodes = itertools.cycle(("13", "forky"))
    return pytest.mark.parametrize(
        ("gpu_node", "name"),
        list(zip(nodes, names, strict=False)),
        indirect=["gpu_node"],
        scope="session",
    )


def begin(start_job: StartJob, node: Node) -> tuple[Job, Report]:
    job = start_job(runtime=honouring(node))
    return job, job.next_report()


def tidy(node: Node, job: Job) -> None:
    """What `ctr run` made and nobody removes once containerd has given a shim up, the stock one
    too."""
    job.end()
    for stdio in node.path("/run/containerd/fifo").iterdir():
        shutil.rmtree(stdio)


@places(failpoint.CHECKPOINT)
def test_daemon_killed_at_a_checkpoint(
    gpu_node: Place, start_job: StartJob, images: str, name: str
) -> None:
    node, board = gpu_node
    configure(node, lane_from=1 << 20)
    job, before = begin(start_job, node)
    with held(node, name) as place:
        client = checkpointing(job, images)
        killed_at(node, name, place.reached(), job)
        client.communicate(timeout=60)
    if name in WHOLE:
        job.save_rootfs(diff_beside(images))
    tidy(node, job)
    assert board.owners() == {}
    where = node.path(images)
    until("the draft's end", lambda: not list(where.parent.glob("*partial*")))
    assert (where / "grit.json").exists() == (name in WHOLE)
    if name in WHOLE:
        go_on(before, restored_by_annotation(start_job, images).next_report())
    else:
        fresh, before = begin(start_job, node)
        fresh.checkpoint_task(images)
        go_on(before, fresh.next_report())


@places(failpoint.RESTORE)
def test_daemon_killed_at_a_restore(
    gpu_node: Place, start_job: StartJob, images: str, name: str
) -> None:
    """The checkpoint is unharmed, and the next attempt restores it."""
    node, board = gpu_node
    configure(node)
    job, before = begin(start_job, node)
    job.checkpoint_task(images)
    job.save_rootfs(diff_beside(images))
    job.end()
    failed = restored_by_annotation(start_job, images, run=False)
    client = threading.Thread(target=failed.try_run)
    with held(node, name) as place:
        client.start()
        killed_at(node, name, place.reached(), failed)
        client.join(60)
    tidy(node, failed)
    assert board.owners() == {}
    go_on(before, restored_by_annotation(start_job, images).next_report())


HANGS = """#!/bin/sh
[ -e /run/criu-hangs ] && exec sleep 3600
exec criu "$@"
"""


@on_13
def test_criu_that_hangs_before_it_holds_a_process(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """Nothing but the journal leads from the container to it."""
    node, _ = gpu_node
    script = node.path("/var/tmp/criu-that-may-hang")
    script.write_text(HANGS)
    script.chmod(0o755)
    configure(node, criu="/var/tmp/criu-that-may-hang")
    job, _ = begin(start_job, node)
    hangs = node.path("/run/criu-hangs")
    with held(node, "dump") as place:
        client = checkpointing(job, images)
        daemon = place.reached()
        hangs.touch()
        place.go_on()
    try:
        until("CRIU", lambda: node.pids("sleep"))
        node.run(["kill", "-9", str(daemon)])
        client.communicate(timeout=60)
        until("CRIU's end", lambda: not node.pids("sleep"))
    finally:
        hangs.unlink()
    tidy(node, job)


@pytest.mark.parametrize(
    ("gpu_node", "how"),
    [("13", "client"), ("13", "checkpoint"), ("forky", "containerd")],
    indirect=["gpu_node"],
    scope="session",
)
def test_watchdog(gpu_node: Place, start_job: StartJob, images: str, how: str) -> None:
    """A Pause whose client has gone: it, or containerd with it; or both but after a Checkpoint."""
    node, _ = gpu_node
    configure(node, pause_timeout=0.5)
    job, before = begin(start_job, node)
    if how == "checkpoint":
        with held(node, "let-go") as place:
            client = checkpointing(job, images)
            place.reached()
            client.kill()
            client.communicate()
            place.go_on()
        published(node, images)
    else:
        job.ctr("task", "pause", job.name)
        if how == "containerd":
            restart_containerd(node, signal.SIGKILL)
    until("the watchdog", lambda: "(pause_timeout); the container runs on" in node.containerd_log())
    alive_and_well(job, before, images, dumped=how == "checkpoint")
    assert journals(node) == []


@on_forky
def test_failed_while_it_looks_again(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """The last moment at which a Pause can fail: the container is frozen already."""
    node, _ = gpu_node
    configure(node)
    job, before = begin(start_job, node)
    with told_to(node, "look-again", "raise"):
        failed = job.ctr("task", "pause", job.name, check=False)
    assert "failpoint look-again" in failed.stderr
    assert journals(node) == []
    alive_and_well(job, before, images)
