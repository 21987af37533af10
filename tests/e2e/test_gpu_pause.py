"""Pause and Resume alone, what is answered while a dump is under way, and a container that is
killed in the middle of one."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from shim.cuda.discovery import anonymous_memory
from tests.e2e.faults import helpers
from tests.e2e.gpu import STATUS, configure, go_on, honouring, until
from tests.e2e.marks import on_forky
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

NESTED = "--cap-add=CAP_SYS_ADMIN"


def suspensions(node: Node) -> int:
    return node.containerd_log().count('msg="GPU suspended"')


def test_pause_gives_the_memory_back(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    configure(node)
    job = start_job()
    held = board.owners()
    before = job.next_report()
    for _ in range(2):
        job.ctr("task", "pause", job.name)
        assert job.status() == "PAUSED"
        assert board.owners() == {}
        job.ctr("task", "resume", job.name)
        assert job.status() == "RUNNING"
        assert board.owners() == held
        assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    go_on(before, job.next_report())


def test_resumed_although_it_was_thawed(gpu_node: Place, start_job: StartJob) -> None:
    """As a CRIU that is killed in the middle of a dump may leave it."""
    node, board = gpu_node
    configure(node)
    job = start_job()
    before = job.next_report()
    job.ctr("task", "pause", job.name)
    v1 = node.path(f"/sys/fs/cgroup/freezer/default/{job.name}/freezer.state")
    if v1.exists():
        v1.write_text("THAWED")
    else:
        node.path(f"/sys/fs/cgroup/default/{job.name}/cgroup.freeze").write_text("0")
    job.ctr("task", "resume", job.name)
    assert job.status() == "RUNNING"
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    go_on(before, job.next_report())


def calls(node: Node) -> set[int]:
    """The driver calls under way: threads of the helper, but for its first."""
    threads: set[int] = set()
    for pid in helpers(node):
        with contextlib.suppress(OSError):
            threads |= {int(name) for name in os.listdir(node.path(f"/proc/{pid}/task"))} - {pid}
    return threads


def test_a_tree_is_suspended_at_once(gpu_node: Place, start_job: StartJob, engine: str) -> None:
    """Four CUDA processes, one without a context and one in a pid namespace of its own, each of
    which takes its time: the slowest counts, not the sum. No lock is granted before all have been
    asked for, and no copy ends before all have begun. CRIU dumps no nested pid namespace, and says
    so; suspended it is like any other, and it goes on unharmed."""
    node, board = gpu_node
    configure(node, engine=engine)
    words = ["--procs", "newpid,init,ctx", "--bytes", str(1 << 20)]
    job = start_job(*words, options=[NESTED], runtime=honouring(node))
    marks = {name: job.next_report(name) for name in (STATUS, *(f"/status.p{n}" for n in range(3)))}
    held = board.owners()
    assert sorted(held.values()) == [0, 1 << 20, 1 << 20, 1 << 20]
    holders = {pid: anonymous_memory(pid) for pid, size in held.items() if size}

    board.fault("lock=hang,speed=1000000")
    pause = node.popen(["ctr", "task", "pause", job.name])
    until("four locks asked for", lambda: len(calls(node)) == 4)
    board.fault("speed=1000000")
    if engine == "driver":  # CRIU's plugin copies, and one after the other
        until("three copies", lambda: all(anonymous_memory(p) != holders[p] for p in holders))
        assert holders.keys() <= board.owners().keys()
    board.end_faults()
    assert pause.wait(60) == 0
    assert job.status() == "PAUSED"
    assert board.owners() == ({} if engine == "driver" else held)
    job.ctr("task", "resume", job.name)
    assert board.owners() == held

    done = job.checkpoint_task("/var/tmp/nested", check=False)
    assert done.returncode != 0
    assert "pid namespace" in done.stderr
    assert board.owners() == held
    for name, mark in marks.items():
        go_on(mark, job.next_report(name))


@on_forky
def test_pause_without_gpu(gpu_node: Place, start_job: StartJob) -> None:
    """No helper, no driver: the stock path."""
    node, board = gpu_node
    configure(node)
    so_far = suspensions(node)
    job = start_job("--kind", "cpu")
    job.ctr("task", "pause", job.name)
    assert job.status() == "PAUSED"
    again = job.ctr("task", "pause", job.name, check=False)
    assert "cannot pause a paused container" in again.stderr
    job.ctr("task", "resume", job.name)
    job.next_report()
    again = job.ctr("task", "resume", job.name, check=False)
    assert "cannot resume a running process" in again.stderr
    assert suspensions(node) == so_far
    assert board.owners() == {}


def hold_criu(node: Node, images: str) -> list[int]:
    """Stops the CRIU that has begun to write images; the host pids of it and its worker."""
    place = node.path(images).parent
    until("an image", lambda: any(place.glob(".*/*.img")))
    namespace = node.path("/proc/1/ns/pid").readlink()
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            here = (process / "ns/pid").readlink() == namespace
            if here and (process / "comm").read_text() == "criu\n":
                pids.append(int(process.name))
    signal_all(pids, signal.SIGSTOP)
    assert pids
    return pids


def signal_all(pids: list[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def answers(job: Job) -> None:
    """State, Pids, Stats, and a signal for a process that is not there."""
    assert job.status() in ("RUNNING", "PAUSED")
    assert str(job.node_pid()) in job.ctr("task", "ps", job.name).stdout
    job.ctr("task", "metrics", job.name)
    nobody = job.ctr("task", "kill", "--exec-id", "none", job.name, check=False)
    assert "not found" in nobody.stderr


def test_answers_while_copying(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """4 MiB at 2 MB/s take 2 s, within which everything else is answered."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    board.fault("speed=2000000")
    pid, memory = job.pid(), anonymous_memory(job.pid())
    dump = job.start_checkpoint(images)
    until("a copy", lambda: anonymous_memory(pid) != memory)
    answers(job)
    assert dump.poll() is None
    board.end_faults()
    assert dump.wait(60) == 0, dump.communicate()
    go_on(before, job.next_report())


def test_answers_while_criu_dumps(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    job = start_job("--cpu-bytes", str(128 << 20), runtime=honouring(node))
    before = job.next_report()
    dump = job.start_checkpoint(images)
    criu = hold_criu(node, images)
    answers(job)
    assert dump.poll() is None
    signal_all(criu, signal.SIGCONT)
    assert dump.wait(60) == 0, dump.communicate()
    go_on(before, job.next_report())


def test_killed_while_criu_dumps(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job("--cpu-bytes", str(128 << 20), runtime=honouring(node))
    dump = job.start_checkpoint(images)
    criu = hold_criu(node, images)
    job.ctr("task", "kill", "--signal", "SIGKILL", job.name)
    signal_all(criu, signal.SIGCONT)
    assert dump.wait(60) != 0
    until("the task's end", lambda: job.status() == "STOPPED")
    assert board.owners() == {}
    assert not node.pids("criu")
    assert not node.path(images).exists()
    assert not list(node.path(images).parent.glob(".*"))


def test_killed_while_locking(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    board.fault("lock=never")
    dump = job.start_checkpoint(images)
    until("the helper", lambda: any("helper" in " ".join(w) for w in node.processes().values()))
    job.ctr("task", "kill", "--signal", "SIGKILL", job.name)
    assert dump.wait(60) != 0
    until("the task's end", lambda: job.status() == "STOPPED")
    assert not node.path(images).exists()


def test_killed_while_copying(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    board.fault("speed=500000")
    pid, memory = job.pid(), anonymous_memory(job.pid())
    dump = job.start_checkpoint(images)
    until("a copy", lambda: anonymous_memory(pid) != memory)
    job.ctr("task", "kill", "--signal", "SIGKILL", job.name)
    assert dump.wait(60) != 0
    until("the task's end", lambda: job.status() == "STOPPED")
    assert board.owners() == {}
    assert not list(node.path(images).parent.rglob("*.img"))
