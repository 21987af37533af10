"""gritctl on running containers: checkpoint, restore, suspend and resume, as a newcomer types them
after reading the help; a pod; Ctrl-C in every phase; what goes wrong and what is said then."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from shim.cuda.discovery import anonymous_memory
from tests.e2e.gpu import configure, go_on, until
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_checkpoint import unbroken
from tests.e2e.test_gpu_failures import tmpfs
from tests.e2e.test_gpu_pause import hold_criu, signal_all
from tests.e2e.test_gritctl_stored import gritctl
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node, Process
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

PLACE = "/var/lib/checkpoints"
DIR = f"{PLACE}/job"


@pytest.fixture(autouse=True)
def _clean(gpu_node: Place) -> Iterator[None]:
    node, _ = gpu_node
    configure(node)
    yield
    path = node.path(PLACE)
    # A draft left behind would be one of those that nobody may leave.
    left = (
        [entry.name for entry in path.iterdir() if "partial" in entry.name] if path.exists() else []
    )
    shutil.rmtree(path, ignore_errors=True)
    assert left == []
    assert "gritctl" not in node.ctr("leases", "ls").stdout
    assert "gritctl" not in node.ctr("snapshots", "ls").stdout


def test_checkpoint_and_restore(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    job = start_job()
    before = job.next_report()
    text = gritctl(node, "checkpoint", "job", "--to", DIR)
    for phase in ("suspend", "dump", "rootfs", "resume", "publish"):
        assert f"job: {phase}  " in text
    assert "GB/s" in text
    assert f"{DIR}: " in text
    assert job.status() == "RUNNING"
    go_on(before, job.next_report())
    names = {entry.name for entry in node.path(DIR).iterdir()}
    assert names == {"checkpoint", "rootfs-diff.tar", "config.dump", "spec.dump", "SHA256SUMS"}
    assert "can be restored on this node" in gritctl(node, "verify", DIR)
    node.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=DIR)
    assert node.path(DIR).stat().st_mode & 0o777 == 0o700
    job.end()
    assert board.owners() == {}

    start_job(name="job2", run=False)  # so that the fixture removes it
    text = gritctl(node, "restore", DIR, "--name", "job2", "--annotation", "example.org/a=b")
    assert "job2: runs, pid " in text
    again = start_job(name="job2", run=False)
    after = again.next_report()
    go_on(before, after)
    unbroken(again)
    assert sum(board.owners().values()) == 4 << 20
    spec = json.loads(node.ctr("container", "info", "job2").stdout)["Spec"]
    assert spec["annotations"]["example.org/a"] == "b"
    assert spec["linux"]["cgroupsPath"] == "/default/job2"
    assert "already; --name gives" in gritctl(node, "restore", DIR, "--name", "job2", status=1)
    # the restored one can be saved in its turn
    gritctl(node, "checkpoint", "job2", "--to", f"{PLACE}/second")
    assert "job2" in gritctl(node, "ls")
    assert node.run(["gritctl", "diff", DIR, f"{PLACE}/second"]).stdout


@on_forky
def test_damage_beside_the_images_is_met(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    with open(node.path(f"{DIR}/spec.dump"), "a") as file:
        file.write(" ")
    assert "spec.dump: has SHA-256 " in gritctl(node, "verify", DIR, status=3)


def test_exit(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    job = start_job()
    before = job.next_report()
    text = gritctl(node, "checkpoint", "--exit", "job", "--to", DIR)
    assert "job: end" in text and "job: resume" not in text
    assert job.status() == "STOPPED"
    assert board.owners() == {}
    job.end()
    start_job(name="job", run=False)
    gritctl(node, "restore", DIR)
    after = start_job(name="job", run=False)
    go_on(before, after.next_report())
    unbroken(after)


@on_forky
def test_json_events(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    text = gritctl(node, "checkpoint", "--json", "job", "--to", DIR)
    events = [json.loads(line) for line in text.splitlines()]
    ended = {e["phase"]: e for e in events if e["event"] == "end"}
    assert set(ended) == {"suspend", "dump", "rootfs", "resume", "publish"}
    assert all(e["ok"] for e in ended.values())
    assert ended["dump"]["bytes"] > 4 << 20
    assert events[-1]["event"] == "done" and events[-1]["path"] == DIR


@on_forky
def test_bars_on_a_terminal(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    program = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    words = ["gritctl", "checkpoint", "job", "--to", DIR]
    done = node.run(["python3", "-c", program, *words], env={"TERM": "xterm", "COLUMNS": "120"})
    assert "\x1b[" in done.stdout and "━" in done.stdout and "GB/s" in done.stdout


def test_suspend_and_resume(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    job = start_job()
    held = board.owners()
    before = job.next_report()
    assert "job: frozen, 4.0 MiB of GPU memory on the host" in gritctl(node, "suspend", "job")
    assert job.status() == "PAUSED" and board.owners() == {}
    assert "is paused already" in gritctl(node, "suspend", "job", status=1)
    # A container that was paused before is saved, and stays so.
    gritctl(node, "checkpoint", "job", "--to", DIR)
    assert job.status() == "PAUSED"
    assert "job: runs" in gritctl(node, "resume", "job")
    assert board.owners() == held
    go_on(before, job.next_report())


# --- pods ---------------------------------------------------------------------------------


def pod_options(name: str) -> list[str]:
    return [
        "--label=io.kubernetes.pod.name=train-0",
        "--label=io.kubernetes.pod.namespace=ml",
        "--annotation=io.kubernetes.cri.sandbox-id=sandbox1",
        "--annotation=io.kubernetes.cri.container-type=container",
        f"--annotation=io.kubernetes.cri.container-name={name}",
        f"--label=io.kubernetes.container.name={name}",
    ]


@on_forky
@pytest.mark.parametrize("wanted", ["train-0", "ml/train-0", "sandbox1"])
def test_a_whole_pod(gpu_node: Place, start_job: StartJob, wanted: str) -> None:
    node, _ = gpu_node
    jobs = [
        start_job(name=f"{name}-id", options=pod_options(name)) for name in ("worker", "logger")
    ]
    before = [job.next_report() for job in jobs]
    text = gritctl(node, "checkpoint", wanted, "--to", DIR)
    assert "worker: dump" in text and "logger: dump" in text
    for job, report in zip(jobs, before, strict=True):
        go_on(report, job.next_report())
    names = {entry.name for entry in node.path(DIR).iterdir()}
    assert names == {"worker", "logger", "SHA256SUMS"}
    gritctl(node, "verify", DIR)
    shown = gritctl(node, "show", DIR)
    assert f"{DIR}/worker" in shown and f"{DIR}/logger" in shown
    assert "is a pod's checkpoint: give the new pod the annotation" in gritctl(
        node, "restore", DIR, status=1
    )
    # a new pod's container of that name, as Kubernetes would start it
    for job in jobs:
        job.end()
    options = [*pod_options("worker"), f"--annotation=grit.dev/checkpoint={DIR}"]
    again = start_job(name="worker-id2", options=options)
    go_on(before[0], again.next_report())
    gritctl(node, "rm", DIR)


# --- interrupted --------------------------------------------------------------------------


def begin(node: Node, *words: str) -> Process:
    words = ("gritctl", *(words or ("checkpoint", "job", "--to", DIR)))
    return node.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def interrupt(node: Node, number: int = signal.SIGINT) -> None:
    """As a terminal does: gritctl itself, by its pid in the node."""
    for pid, words in node.processes().items():
        if any(word.endswith("/gritctl") for word in words):
            os.kill(node.host_pid(pid), number)


def hold_dump(node: Node) -> list[int]:
    """Stops CRIU in the middle of its dump; its pids."""
    until("a draft", lambda: list(node.path(PLACE).glob(".*/.*")))
    place = next(iter(node.path(PLACE).glob(".*")))
    return hold_criu(node, f"{PLACE}/{place.name}/checkpoint")


def goes_on(job: Job, board: SimGpu, process: Process) -> None:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert "interrupted. Undone: no checkpoint was made, and job runs on" in err
    assert job.status() == "RUNNING"
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    job.next_report()
    assert not job.node.path(DIR).exists()
    assert not job.node.pids("criu")
    gritctl(job.node, "checkpoint", "job", "--to", DIR)


def test_interrupted_while_copying(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    job = start_job()
    board.fault("speed=2000000")
    pid, memory = job.pid(), anonymous_memory(job.pid())
    process = begin(node)
    until("a copy", lambda: anonymous_memory(pid) != memory)
    interrupt(node)
    board.end_faults()
    goes_on(job, board, process)


@pytest.mark.parametrize(
    ("gpu_node", "number"),
    [("13", signal.SIGTERM), ("forky", signal.SIGINT), ("forky", signal.SIGHUP)],
    indirect=["gpu_node"],
    scope="session",
)
def test_interrupted_while_criu_dumps(
    gpu_node: Place, start_job: StartJob, number: signal.Signals
) -> None:
    node, board = gpu_node
    job = start_job("--cpu-bytes", str(128 << 20))
    process = begin(node)
    criu = hold_dump(node)
    interrupt(node, number)
    signal_all(criu, signal.SIGCONT)
    goes_on(job, board, process)


@on_forky
def test_interrupted_while_criu_hangs(gpu_node: Place, start_job: StartJob) -> None:
    """The dump is given up: it is not waited for to its end, which here never comes."""
    node, board = gpu_node
    job = start_job("--cpu-bytes", str(128 << 20))
    process = begin(node)
    hold_dump(node)
    interrupt(node)
    goes_on(job, board, process)


@on_forky
def test_interrupted_suspend(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    job = start_job()
    board.fault("speed=2000000")
    pid, memory = job.pid(), anonymous_memory(job.pid())
    process = begin(node, "suspend", "job")
    until("a copy", lambda: anonymous_memory(pid) != memory)
    interrupt(node)
    board.end_faults()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; job runs on" in err
    assert job.status() == "RUNNING"
    job.next_report()


def test_interrupted_restore(gpu_node: Place, start_job: StartJob) -> None:
    """It ends before it is undone: the job's GPU is on its way back."""
    node, board = gpu_node
    job = start_job()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    job.end()
    again = start_job(run=False)
    board.fault("speed=2000000")
    process = begin(node, "restore", DIR)
    until("a container", again.status)
    interrupt(node)
    _, err = process.communicate(timeout=60)
    board.end_faults()
    assert process.returncode == 130, err
    assert "interrupted. Nothing of it is left" in err
    assert again.status() == ""
    assert "job" not in node.ctr("container", "ls", "-q").stdout.split()
    assert "job" not in node.ctr("snapshots", "ls").stdout
    assert board.owners() == {}


# --- what goes wrong ----------------------------------------------------------------------


def test_failures_leave_it_running(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    configure(node, lock_timeout=0.5)
    job = start_job()
    board.fault("lock=never")
    text = gritctl(node, "checkpoint", "job", "--to", DIR, status=1)
    assert "not locked within" in text
    assert "Undone: no checkpoint was made, and job runs on" in text
    board.end_faults()
    assert not node.path(DIR).exists()
    job.next_report()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    text = gritctl(node, "checkpoint", "job", "--to", DIR, status=1)
    assert "it is not empty" in text
    text = gritctl(node, "checkpoint", "job", "--to", "/nowhere/at/all", status=1)
    assert "there is no directory /nowhere/at" in text


@on_forky
def test_a_gpu_that_does_not_come_back(gpu_node: Place, start_job: StartJob) -> None:
    """What was saved is whole, and may be all that is left: it is kept."""
    node, board = gpu_node
    job = start_job()
    before = job.next_report()
    with board.faulty("restore=failed"):
        text = gritctl(node, "checkpoint", "job", "--to", DIR, status=1)
    assert f"the checkpoint {DIR} is whole, but container job could not be resumed" in text
    gritctl(node, "verify", DIR)
    job.end()
    again = start_job(run=False)
    gritctl(node, "restore", DIR)
    go_on(before, again.next_report())


@on_forky
def test_a_full_disk(gpu_node: Place, start_job: StartJob) -> None:
    """DIR is a mount point, too, so its draft lies within it."""
    node, _ = gpu_node
    job = start_job()
    small = f"{PLACE}/small"
    node.run(["mkdir", "-p", PLACE])
    with tmpfs(node, small, "2m"):
        text = gritctl(node, "checkpoint", "job", "--to", small, status=1)
        assert "Undone: no checkpoint was made, and job runs on" in text
        assert list(node.path(small).iterdir()) == []
    job.next_report()
    with tmpfs(node, small, "64m"):
        gritctl(node, "checkpoint", "job", "--to", small)
        gritctl(node, "verify", small)


@on_forky
def test_what_is_not_there(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    text = gritctl(node, "checkpoint", "jop", "--to", DIR, status=1)
    assert "no container and no pod jop in containerd's namespace default, which has job" in text
    text = gritctl(node, "suspend", "-n", "k8s.io", "job", status=1)
    assert "there is one in default: --namespace default" in text
    text = gritctl(node, "suspend", "-a", "/run/no.sock", "job", status=1)
    assert "no containerd at /run/no.sock: No such file or directory" in text
    assert "Missing option '--to'" in gritctl(node, "checkpoint", "job", status=2)


@on_forky
def test_without_root(gpu_node: Place, start_job: StartJob) -> None:
    """With access to the socket; without, it is said."""
    node, _ = gpu_node
    job = start_job()
    words = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "gritctl"]
    done = node.run([*words, "suspend", "job"], check=False)
    assert done.returncode == 1
    assert "is not yours to use" in done.stderr
    socket = node.path("/run/containerd/containerd.sock")
    node.run(["chmod", "711", "/run/containerd"])
    os.chown(socket, 0, 1000)
    os.chmod(socket, 0o660)
    node.run(["mkdir", "-p", "/home/me"])
    os.chown(node.path("/home/me"), 1000, 1000)
    node.run([*words, "suspend", "job"])
    node.run([*words, "resume", "job"])
    node.run([*words, "checkpoint", "job", "--to", "/home/me/job"])
    job.next_report()
    said = gritctl(node, "verify", "/home/me/job", status=4)
    assert "/home/me/job: belongs to the user 1000; it must be root's" in said
    gritctl(node, "rm", "/home/me/job")
