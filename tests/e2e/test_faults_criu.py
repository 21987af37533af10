"""CRIU killed, stopped, or out of room at the very last moment of a dump: the container goes on as
before, the client is told why, and no partial checkpoint is left."""

from __future__ import annotations

import concurrent.futures
import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.e2e.failpoints import held
from tests.e2e.faults import (
    alive_and_well,
    checkpointing,
    criu_halted,
    criu_restoring,
    start,
    told,
    tracer,
)
from tests.e2e.gpu import configure, go_on, restored_by_annotation, until
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_failures import tmpfs

if TYPE_CHECKING:
    from tests.e2e.faults import Place, StartJob


def test_killed(gpu_node: Place, start_job: StartJob, images: str, engine: str) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    job, before = start(start_job, node)
    client = checkpointing(job, images)
    os.kill(criu_halted(job), signal.SIGKILL)
    why = told(client)
    assert "CRIU ended without an answer (killed by signal 9)" in why
    assert "the container stays paused" in why  # until the client's Resume
    alive_and_well(job, before, images)


@pytest.mark.parametrize("flags", [[], ["--exit"]], ids=["goes on", "exit"])
def test_killed_when_all_is_written(
    gpu_node: Place, start_job: StartJob, images: str, flags: list[str]
) -> None:
    """The checkpoint was there, but its call fails: it must not be found under its name, nor be in
    the next one's way."""
    node, _ = gpu_node
    configure(node)
    job, before = start(start_job, node)
    with held(node, "let-go") as place:
        client = checkpointing(job, images, *flags)
        place.reached()
        assert node.path(f"{images}/grit.json").exists()
        os.kill(tracer(job.pid()), signal.SIGKILL)
        place.go_on()
        assert "killed by signal 9" in told(client)
    alive_and_well(job, before, images)


def test_killed_while_the_client_has_it_paused(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    node, _ = gpu_node
    configure(node)
    job, before = start(start_job, node)
    job.ctr("task", "pause", job.name)
    written = len(job.reports())
    client = checkpointing(job, images)
    os.kill(criu_halted(job), signal.SIGKILL)
    assert "killed by signal 9" in told(client)
    assert job.status() == "PAUSED"
    assert len(job.reports()) == written
    job.ctr("task", "resume", job.name)
    alive_and_well(job, before, images)


@on_forky
def test_stopped(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """A CRIU that does nothing any more is given up at the deadline (and GRACE_S)."""
    node, _ = gpu_node
    configure(node, dump_timeout=1)
    job, before = start(start_job, node)
    client = checkpointing(job, images)
    criu_halted(job)
    why = told(client)
    assert "the deadline of 1" in why
    assert "CRIU did not stop within 10 s and was killed" in why
    alive_and_well(job, before, images)


@on_forky
def test_killed_with_the_workload(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """A process that had CRIU's code in it may end with CRIU. The client is told so, and the
    control group is thawed: runc removes nothing that is frozen."""
    node, _ = gpu_node
    configure(node)
    job, _ = start(start_job, node)
    init = job.pid()
    client = checkpointing(job, images)
    criu = criu_halted(job)
    os.kill(init, signal.SIGKILL)
    os.kill(criu, signal.SIGKILL)
    assert "the container has ended: CRIU was killed while it had code" in told(client)
    job.end()
    assert not job.status()


@on_forky
@pytest.mark.parametrize(
    ("sig", "why"),
    [(signal.SIGKILL, "CRIU was killed or crashed"), (signal.SIGSTOP, "not done within the 2 s")],
    ids=["killed", "stopped"],
)
def test_in_a_restore(
    gpu_node: Place, start_job: StartJob, images: str, sig: signal.Signals, why: str
) -> None:
    """runc waits for what CRIU has begun to bring back, which waits for CRIU: nothing of it stays,
    and the checkpoint can be restored again."""
    node, _ = gpu_node
    configure(node, restore_timeout=2)
    job, before = start(start_job, node)
    job.checkpoint_task(images, "--exit")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()
    clean = node.leaks()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        restoring = pool.submit(restored_by_annotation(start_job, images, run=False).try_run)
        os.kill(node.host_pid(criu_restoring(node)), sig)
        done = restoring.result()
    assert done.returncode != 0
    assert why in done.stderr
    job.end()
    until("an end without leaks", lambda: not node.leaks() - clean)
    node.run(["rm", "-r", "/var/log/containerd-shim-grit"])
    go_on(before, restored_by_annotation(start_job, images).next_report())


def test_no_room_for_the_manifest(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """All of CRIU's images are written, and the client wants the container's end: it is still there
    to go on, since the checkpoint is made whole before CRIU lets go of it."""
    node, _ = gpu_node
    configure(node, engine=engine)
    job, before = start(start_job, node)
    room = os.path.dirname(images) + "/room"
    full = f"{room}/checkpoint"
    with tmpfs(node, room, "128m"):
        node.path(full).mkdir()
        job.checkpoint_task(full)
        # The draft's directory is one file more than the checkpoint itself: its last is too many.
        about = os.statvfs(node.path(room))
        files = about.f_files - about.f_ffree
        go_on(before, job.next_report())
    job.remove_checkpoints()
    with tmpfs(node, room, f"128m,nr_inodes={files}"):
        node.path(full).mkdir()
        why = told(checkpointing(job, full, "--exit"))
        assert "cannot publish the checkpoint" in why
        assert "No space left" in why
        assert not list(node.path(full).iterdir())
        assert [entry.name for entry in node.path(room).iterdir()] == ["checkpoint"]
    node.path(room).rmdir()
    alive_and_well(job, before, images)
