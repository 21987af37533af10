"""Moments in the life of a checkpoint, each caught by what it does to the job and not by the clock,
and the one check that follows every fault: the job is alive and well, and its next checkpoint
works.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from shim import messages
from shim.cuda import discovery
from shim.ttrpc import Client, connect
from tests.e2e.gpu import go_on, honouring, until
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.protowire import Message
    from tests.e2e.gpu import Job
    from tests.nodes.node import Node, Process
    from tests.simgpu.simgpu import Report, SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

HELPER = "shim.cuda.helper"
_FUTEX = "202"


def start(start_job: StartJob, node: Node, *words: str) -> tuple[Job, Report]:
    """A job whose dump takes a while, under a name for which ctr passes the image path on; and
    what it said of itself."""
    job = start_job("--cpu-bytes", str(48 << 20), *words, runtime=honouring(node))
    return job, job.next_report()


def checkpointing(job: Job, images: str, *flags: str) -> Process:
    """`ctr task checkpoint` under way."""
    words = ["ctr", "task", "checkpoint", "--image-path", images, *flags, job.name]
    return job.node.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def told(client: Process) -> str:
    """What a client was told that had to fail."""
    _, stderr = client.communicate(timeout=60)
    assert client.returncode != 0, "the checkpoint did not fail"
    return stderr


# --- moments ------------------------------------------------------------------------------------


def lock_under_way(job: Job) -> None:
    """With the fault lock=never: the job's thread waits until it may use the GPU again."""
    init = job.pid()

    def waits() -> bool:
        with open(f"/proc/{init}/syscall") as file:
            return file.read().split()[0] == _FUTEX

    until("the lock", waits)


def copy_under_way(job: Job) -> None:
    """With the fault speed=: memory for the copy has appeared in the process."""
    init = job.pid()
    until("the copy", lambda: any(e - s == 4 << 20 for s, e in discovery.anonymous_memory(init)))


def restore_under_way(job: Job) -> None:
    """With the fault speed=, after a copy: the process holds device memory again."""
    init = job.pid()
    until("the GPU's absence", lambda: init not in job.gpu.owners())
    until("the GPU coming back", lambda: job.gpu.owners().get(init))


def helper_calling(node: Node) -> int:
    """The pid in the node of a CUDA helper with a driver call under way."""

    def busy() -> int:
        for pid in helpers(node):
            with contextlib.suppress(OSError):
                if len(os.listdir(node.path(f"/proc/{pid}/task"))) > 1:
                    return pid
        return 0

    return until("a helper in a call", busy)


def helpers(node: Node) -> list[int]:
    return [pid for pid, words in node.processes().items() if any(HELPER in w for w in words)]


def criu_halted(job: Job) -> int:
    """Stops CRIU in the middle of the dump, when it has the job's processes in its hands; its pid
    on the host."""
    init = job.pid()
    deadline = time.monotonic() + 30
    with _first_in_line():
        while not (criu := tracer(init)):
            assert time.monotonic() < deadline, "CRIU did not come"
            time.sleep(0.0005)  # `until` naps longer than a dump may take
        os.kill(criu, signal.SIGSTOP)
    until("CRIU's halt", lambda: _process_state(criu) == "T")
    assert tracer(init) == criu, "the dump was over before CRIU was stopped"
    return criu


@contextlib.contextmanager
def _first_in_line() -> Iterator[None]:
    """This thread gets a processor when it wakes, on however busy a machine."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


def criu_restoring(node: Node) -> int:
    """The pid in the node of the CRIU of a restore under way, when it has begun to bring processes
    back: theirs is the parent."""

    def busy() -> int:
        for pid in node.pids("criu"):
            with contextlib.suppress(OSError):
                children = node.path(f"/proc/{pid}/task/{pid}/children").read_text()
                if "restore" in " ".join(node.processes()[pid]) and children:
                    return pid
        return 0

    with _first_in_line():
        return until("CRIU restoring", busy)


def tracer(pid: int) -> int:
    """Who holds the process of this pid, both on the host; 0 for nobody."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("TracerPid:"))


def _process_state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


@contextlib.contextmanager
def halted(node: Node, program: str) -> Iterator[None]:
    """All processes of one program stand still meanwhile."""
    pids = [str(pid) for pid in node.pids(program)]
    node.run(["kill", "-STOP", *pids])
    yield
    node.run(["kill", "-CONT", *pids], check=False)


def published(node: Node, images: str) -> None:
    """The dump is written and CRIU has gone."""
    until("the images", node.path(f"{images}/grit.json").exists)
    until("CRIU's end", lambda: not node.pids("criu"))


# --- a client of the shim's own socket ------------------------------------------------------------


class Direct:
    """A connection to the job's shim past containerd, as a second client would have one."""

    def __init__(self, job: Job) -> None:
        bundle = job.rootfs().parent
        answer = (bundle / "address").read_text()
        self.service = messages.SERVICES[job.node.containerd_version >= (2, 0)]
        address = answer.partition("unix://")[2].partition('"')[0]
        self.client = Client(connect(str(job.node.path(address))))
        self.id = job.name

    def call(self, method: str, request: Message | None = None, timeout: float = 60) -> bytes:
        request = request or messages.TaskRequest(id=self.id)
        return self.client.call(self.service, method, request.encode(), timeout=timeout)

    def status(self) -> int:
        reply = self.call("State", messages.ExecRequest(id=self.id), timeout=2)
        return messages.StateResponse.decode(reply).status

    def checkpoint(self, images: str) -> None:
        self.call("Checkpoint", messages.CheckpointTaskRequest(id=self.id, path=images))

    def __enter__(self) -> Direct:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()


def answers_meanwhile(job: Job) -> None:
    """The shim answers everybody at once, whatever it is busy with; 2 s is containerd's own limit
    for a State (facts 1.6)."""
    with Direct(job) as shim:
        shim.call("Connect", timeout=2)
        assert shim.status() in (messages.RUNNING, messages.PAUSED)
        shim.call("Pids", timeout=2)
        shim.call("Kill", messages.KillRequest(id=job.name, signal=signal.SIGWINCH), timeout=2)


# --- afterwards -----------------------------------------------------------------------------------


def alive_and_well(job: Job, before: Report, images: str, *, dumped: bool = False) -> None:
    """The job runs with its GPU, none of its memory changed, nothing of the attempt is left, and
    another one works. `dumped`: the attempt itself ended well."""
    node, init = job.node, job.pid()
    until("RUNNING", lambda: job.status() == "RUNNING")
    go_on(before, job.next_report())  # it is not frozen: the driver may be asked
    assert job.gpu.library.state(init) == (simgpu.SUCCESS, simgpu.RUNNING)
    assert job.gpu.owners() == {init: 4 << 20}
    counts = [report.counter for report in job.reports()]
    assert counts == list(range(len(counts)))
    until("the helpers' end", lambda: not helpers(node))
    assert not node.pids("criu") + node.pids("cuda-checkpoint")
    place = node.path(images)
    beside = [entry.name for entry in place.parent.iterdir() if entry != place]
    assert not [name for name in beside if "partial" in name]
    assert place.joinpath("grit.json").exists() == dumped
    if not dumped and place.exists():
        assert not list(place.iterdir())
    job.remove_checkpoints()
    job.checkpoint_task(f"{images}-next")
    assert job.status() == "RUNNING"
    go_on(before, job.next_report())
    node.run(["rm", "-r", f"{images}-next"])
