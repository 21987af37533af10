"""What goes wrong, with a real driver: what it does then is recorded, what the error says of each
process must be so, and the job must go on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.job import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.job import Job, Line
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results

LARGE = "8192"  # MiB: seconds to copy, seconds to write
GIB = 1 << 30

HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
taken = torch.empty(free - (600 << 20), dtype=torch.uint8, device="cuda")
print("taken", taken.numel(), flush=True)
sys.stdin.read()
"""


def state(machine: Machine, pid: int) -> str:
    """The driver's word on a process that runs."""
    words = [machine.command, "--get-state", "--pid", str(pid)]
    try:
        done = machine.run(words, check=False, timeout=30)
    except subprocess.TimeoutExpired:
        return "nothing within 30 s"
    return done.stdout.strip() or done.stderr.strip()


def kill(file: str, mark: str) -> None:
    """SIGKILL for every process with `mark` in its /proc/PID/`file`; there must be one."""
    killed = 0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (entry / file).read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
    assert killed, f"no {mark!r}"


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def written(directory: Path) -> int:
    total = 0
    for file in directory.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def after(holder: Job, before: Line, results: Results, test: str, told: str) -> None:
    """Records what became of the job, and wants it running with what it had."""
    pid = holder.pid()
    facts = {"task": holder.status(), "driver_says": state(holder.machine, pid)}
    try:
        line = holder.next(seconds=30)
        facts["tensors"] = "same" if line["sum"] == before["sum"] else "different"
    except AssertionError as error:
        facts["tensors"] = f"job does not go on: {error}"
    results.finding(test, **facts, told=told)
    assert (facts["task"], facts["driver_says"], facts["tensors"]) == ("RUNNING", "running", "same")


def checkpoint_while(holder: Job, images: str, harm: Callable[[], None]) -> tuple[int, str, float]:
    """A checkpoint that is harmed on its way: its exit status, its words, its seconds."""
    begun = time.monotonic()
    words = holder.machine.ctr_words(*holder.checkpoint_words(images))
    pipe = subprocess.PIPE
    with holder.machine.popen(words, stdout=pipe, stderr=pipe) as client:
        harm()
        _, told = client.communicate(timeout=150)
    return client.returncode, told, time.monotonic() - begun


def test_helper_killed_during_the_copy(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="driver", lock_timeout=30)
    holder = job("hold.py", LARGE)
    before = holder.next()
    pid = holder.pid()
    at_first = resident(pid)

    def harm() -> None:
        until("the copy", lambda: resident(pid) > at_first + GIB, 60, every=0.002)
        kill("cmdline", "shim.cuda.helper")

    status, told, seconds = checkpoint_while(holder, images, harm)
    after(holder, before, results, f"helper killed during the copy ({seconds:.1f} s)", told)
    assert status != 0
    assert str(pid) in told
    holder.checkpoint(images)
    holder.next()


def test_criu_killed_during_the_dump(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="driver", lock_timeout=30, lane="off")  # else it has ended by then
    holder = job("hold.py", LARGE)
    before = holder.next()

    def harm() -> None:
        place = Path(images).parent
        until("images", lambda: written(place) > GIB, 60, every=0.002)
        kill("comm", "criu\n")  # it writes its own command line

    status, told, seconds = checkpoint_while(holder, images, harm)
    after(holder, before, results, f"CRIU killed during the dump ({seconds:.1f} s)", told)
    assert status != 0
    assert not Path(images).exists()
    holder.checkpoint(images)
    holder.next()


def test_lock_timeout_under_a_long_kernel(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="driver", lock_timeout=1)
    busy = job("busy.py", "6")

    def follows(what: str) -> None:
        until(what, lambda: busy.lines()[-1]["follows"] == what, 40, every=0.02)

    follows("idle")
    follows("kernel")
    pid = busy.pid()
    begun = time.monotonic()
    done = busy.checkpoint(images, check=False)
    seconds = round(time.monotonic() - begun, 2)
    said = state(machine, pid)
    follows("idle")
    follows("kernel")
    follows("idle")
    results.finding(
        "lock timeout of 1 s under a kernel of 6 s",
        exit=done.returncode,
        seconds=seconds,
        told=done.stderr,
        driver_says=said,
        driver_says_after_the_next_kernel=state(machine, pid),
    )
    assert done.returncode != 0
    assert "not locked within 1 s" in done.stderr
    assert str(pid) in done.stderr
    assert state(machine, pid) == "running"
    busy.checkpoint(images)
    busy.next()


def test_device_memory_taken_between_suspend_and_resume(
    machine: Machine, job: Callable[..., Job], results: Results
) -> None:
    """A restore that ran out of memory was the process's last, so the driver is not asked."""
    machine.configure(engine="driver", lock_timeout=5)
    holder = job("hold.py", LARGE)
    before = holder.next()
    pid = holder.pid()
    machine.ctr("task", "pause", holder.name)
    pipe = subprocess.PIPE
    hog = subprocess.Popen([sys.executable, "-c", HOG], stdin=pipe, stdout=pipe, text=True)
    try:
        assert hog.stdout and hog.stdout.readline().startswith("taken")
        done = machine.ctr("task", "resume", holder.name, check=False, timeout=120)
        said, task = state(machine, pid), holder.status()
    finally:
        hog.kill()
        hog.wait()
    results.finding(
        "device memory taken by another process, resume",
        exit=done.returncode,
        told=done.stderr,
        driver_says=said,
        task=task,
    )
    again = machine.ctr("task", "resume", holder.name, check=False, timeout=120)
    test = f"device memory free again, second resume (exit {again.returncode})"
    after(holder, before, results, test, again.stderr)
    assert done.returncode != 0
    assert f"in use by pid {hog.pid}" in done.stderr
    assert str(pid) in done.stderr
    assert said == "checkpointed"


def memory_limited(job: Callable[..., Job], limit: int) -> tuple[Job, Path]:
    holder = job("hold.py", "2048", flags=(f"--memory-limit={limit}",))
    maximum = holder.cgroup() / "memory.max"
    assert int(maximum.read_text()) == limit
    return holder, maximum


def test_low_memory_limit_is_refused(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="driver", memory="refuse", lock_timeout=30)
    holder, maximum = memory_limited(job, 2 * GIB)
    before = holder.next()
    done = holder.checkpoint(images, check=False)
    after(holder, before, results, "memory.max of 2 GiB for 2.5 GB, refuse", done.stderr)
    assert done.returncode != 0
    assert "memory" in done.stderr
    assert int(maximum.read_text()) == 2 * GIB


def test_low_memory_limit_is_raised(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="driver", memory="raise", lock_timeout=30)
    holder, maximum = memory_limited(job, 2 * GIB)
    before = holder.next()
    done = holder.checkpoint(images, check=False)
    after(holder, before, results, "memory.max of 2 GiB for 2.5 GB, raise", done.stderr)
    assert done.returncode == 0, done.stderr
    assert int(maximum.read_text()) == 2 * GIB
