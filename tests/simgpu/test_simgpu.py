"""The simulated driver has the manners that were measured on a real one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simgpu.conftest import Workload, wait_for
from tests.simgpu.simgpu import (
    CHECKPOINTED,
    FAILED,
    ILLEGAL_STATE,
    INVALID_DEVICE,
    INVALID_VALUE,
    LOCKED,
    NOT_INITIALIZED,
    NOT_READY,
    OPERATING_SYSTEM,
    OUT_OF_MEMORY,
    RUNNING,
    SUCCESS,
    SimGpu,
)

if TYPE_CHECKING:
    from tests.simgpu.simgpu import Kit

Start = Callable[..., Workload]
MIB = 1 << 20
WATCH = 1.0  # seconds a call that must not come back is watched


def suspend(gpu: SimGpu, pid: int) -> None:
    assert gpu.library.lock(pid, 10_000) == SUCCESS
    assert gpu.library.checkpoint(pid) == SUCCESS


def resume(gpu: SimGpu, pid: int) -> None:
    assert gpu.library.restore(pid) == SUCCESS
    assert gpu.library.unlock(pid) == SUCCESS


def open_files(pid: int) -> list[str]:
    return [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]


def anonymous_regions(pid: int) -> set[tuple[int, int]]:
    """(start, end) of the private anonymous mappings that can be read and written."""
    regions = set()
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if found := re.fullmatch(r"(\w+)-(\w+) rw-p 0+ 00:00 0 *", line):
            regions.add((int(found[1], 16), int(found[2], 16)))
    return regions


def child_pids(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Call(threading.Thread):
    """One driver call that may not come back; it ends when its target does."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__(daemon=True)
        self.call = call
        self.result: object = None
        self.start()

    def run(self) -> None:
        self.result = self.call()

    def still_waits(self) -> bool:
        self.join(WATCH)
        return self.is_alive()

    def finish(self) -> object:
        self.join(30)
        assert not self.is_alive()
        return self.result


# --- the life of one process ---------------------------------------------------------------


def test_lock_checkpoint_restore_unlock(gpu: SimGpu, start: Start) -> None:
    work = start()
    pid, library = work.pid, gpu.library
    before = work.goes_on()

    assert library.state(pid) == (SUCCESS, RUNNING)
    assert library.lock(pid) == SUCCESS
    assert library.state(pid) == (SUCCESS, LOCKED)
    assert library.checkpoint(pid) == SUCCESS
    assert library.state(pid) == (SUCCESS, CHECKPOINTED)
    assert gpu.owners() == {}
    assert library.restore(pid) == SUCCESS
    assert library.state(pid) == (SUCCESS, LOCKED)
    assert library.unlock(pid) == SUCCESS
    assert library.state(pid) == (SUCCESS, RUNNING)

    after = work.goes_on()
    assert (after.device, after.cpu) == (before.device, before.cpu)


def test_the_application_waits_while_locked_and_goes_on_where_it_was(
    gpu: SimGpu, start: Start
) -> None:
    work = start()
    assert gpu.library.lock(work.pid) == SUCCESS
    wait_for("the call at the gate", lambda: "futex" in wchan(work.pid))
    stopped_at = work.reports()[-1].counter
    assert gpu.library.checkpoint(work.pid) == SUCCESS
    assert gpu.library.restore(work.pid) == SUCCESS
    assert work.reports()[-1].counter == stopped_at
    assert gpu.library.unlock(work.pid) == SUCCESS
    assert work.goes_on().counter > stopped_at


def wchan(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text()


def test_checkpoint_moves_device_memory_into_one_private_anonymous_region(
    gpu: SimGpu, start: Start
) -> None:
    work = start("--bytes", str(8 * MIB))
    before = anonymous_regions(work.pid)
    suspend(gpu, work.pid)
    appeared = anonymous_regions(work.pid) - before
    assert [end - start for start, end in appeared] == [8 * MIB]
    resume(gpu, work.pid)
    assert anonymous_regions(work.pid) == before


def test_the_device_is_open_only_while_attached(gpu: SimGpu, start: Start) -> None:
    work = start()
    device = str(gpu.directory / "dev/nvidia0")
    assert device in open_files(work.pid)
    suspend(gpu, work.pid)
    assert not [name for name in open_files(work.pid) if name.startswith(str(gpu.directory))]
    resume(gpu, work.pid)
    assert device in open_files(work.pid)


def test_the_restore_thread_is_one_of_its_own_that_takes_no_signal(
    gpu: SimGpu, start: Start
) -> None:
    work = start()
    code, tid = gpu.library.restore_thread(work.pid)
    assert code == SUCCESS
    assert tid != work.pid
    status = Path(f"/proc/{work.pid}/task/{tid}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    assert all(blocked & 1 << (number - 1) for number in (signal.SIGTERM, signal.SIGUSR1))


def test_a_call_may_name_any_thread_of_the_process(gpu: SimGpu, start: Start) -> None:
    """CRIU's plugin asks for the state by the restore thread's id."""
    work = start()
    code, tid = gpu.library.restore_thread(work.pid)
    assert code == SUCCESS
    assert gpu.library.restore_thread(tid) == (SUCCESS, tid)
    assert gpu.library.lock(tid) == SUCCESS
    assert gpu.library.state(tid) == (SUCCESS, LOCKED)
    assert gpu.library.state(work.pid) == (SUCCESS, LOCKED)


def test_steps_out_of_order_are_illegal(gpu: SimGpu, start: Start) -> None:
    pid, library = start().pid, gpu.library
    assert library.checkpoint(pid) == ILLEGAL_STATE
    assert library.restore(pid) == ILLEGAL_STATE
    assert library.unlock(pid) == ILLEGAL_STATE
    assert library.lock(pid) == SUCCESS
    assert library.lock(pid) == ILLEGAL_STATE
    assert library.restore(pid) == ILLEGAL_STATE
    assert library.checkpoint(pid) == SUCCESS
    assert library.checkpoint(pid) == ILLEGAL_STATE
    assert library.unlock(pid) == ILLEGAL_STATE


# --- whom a call can be about ---------------------------------------------------------------


def test_only_a_process_with_cuda_initialised_has_a_state(gpu: SimGpu, start: Start) -> None:
    work = start("--procs", "map,cpu,init,fork")
    for name in ("p0", "p1", "p2", "p3", "p3c"):
        work.pid_of(name)
    (forked,) = child_pids(work.pid_of("p3"))
    answers = {
        "no libcuda": gpu.library.state(work.pid_of("p1")),
        "libcuda only mapped": gpu.library.state(work.pid_of("p0")),
        "no context": gpu.library.state(work.pid_of("p2")),
        "child of fork": gpu.library.state(forked),
        "no such process": gpu.library.state(2**22 - 1),
    }
    assert answers == {
        "no libcuda": (NOT_INITIALIZED, -1),
        "libcuda only mapped": (NOT_INITIALIZED, -1),
        "no context": (SUCCESS, RUNNING),
        "child of fork": (NOT_INITIALIZED, -1),
        "no such process": (INVALID_VALUE, -1),
    }
    assert gpu.library.restore_thread(forked)[0] == NOT_INITIALIZED


def test_a_forked_child_holds_the_device_and_nothing_else_of_the_gpu(
    gpu: SimGpu, start: Start
) -> None:
    """As the real driver leaves it (docs/gpu.md): of no use to the child, and CRIU refuses it."""
    work = start("--kind", "fork")
    (child,) = child_pids(work.pid)
    held = [name for name in open_files(child) if name.startswith(f"{gpu.directory}/")]
    assert held == [f"{gpu.directory}/dev/nvidia0"]
    assert list(gpu.owners()) == [work.pid]


def test_a_process_in_a_pid_namespace_of_its_own(gpu: SimGpu, start: Start) -> None:
    work = start("--procs", "newpid", "--bytes", str(MIB))
    wait_for("nested process", lambda: bool(work.reports("p0")))
    assert work.reports("p0")[0].pid == 1
    (parent,) = child_pids(work.pid)
    (nested,) = child_pids(parent)
    code, tid = gpu.library.restore_thread(nested)
    assert code == SUCCESS
    assert Path(f"/proc/{nested}/task/{tid}").exists()
    suspend(gpu, nested)
    assert gpu.owners() == {work.pid: MIB}
    resume(gpu, nested)
    seen = len(work.reports("p0"))
    wait_for("nested process goes on", lambda: len(work.reports("p0")) > seen + 1)
    assert work.reports("p0")[-1].ok


def test_processes_that_come_and_go(gpu: SimGpu, start: Start) -> None:
    work = start("--procs", "churn")
    wait_for("three of them", lambda: len(work.reports("churned")) >= 9)
    assert all(report.ok for report in work.reports("churned"))


# --- a process that stands still ------------------------------------------------------------


def freezers() -> list[tuple[str, Path]]:
    """(kind, directory to make a group in) of the freezers this host has."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, kind = line.partition(" - ")
        place, options = fields.split()[4], kind.split()[2]
        if kind.startswith("cgroup2"):
            found.append(("v2", Path(place)))
        elif kind.startswith("cgroup ") and "freezer" in options.split(","):
            found.append(("v1", Path(place)))
    return found


class Freezer:
    def __init__(self, kind: str, root: Path) -> None:
        self.group = root / f"simgpu-test-{os.getpid()}"
        self.group.mkdir()
        self.control = self.group / ("cgroup.freeze" if kind == "v2" else "freezer.state")
        self.words = ("1", "0") if kind == "v2" else ("FROZEN", "THAWED")
        self.root = root

    def freeze(self, pid: int) -> None:
        (self.group / "cgroup.procs").write_text(str(pid))
        self.control.write_text(self.words[0])
        wait_for("frozen", self.is_frozen)

    def is_frozen(self) -> bool:
        if self.words[0] == "1":
            return "frozen 1" in (self.group / "cgroup.events").read_text()
        return self.control.read_text().strip() == "FROZEN"

    def thaw(self) -> None:
        self.control.write_text(self.words[1])

    def close(self) -> None:
        self.thaw()
        for pid in (self.group / "cgroup.procs").read_text().split():
            (self.root / "cgroup.procs").write_text(pid)
        wait_for("empty group", lambda: not (self.group / "cgroup.procs").read_text())
        self.group.rmdir()


@pytest.fixture(params=freezers(), ids=lambda found: str(found[0]))
def freezer(request: pytest.FixtureRequest) -> Iterator[Freezer]:
    freezer = Freezer(*request.param)
    yield freezer
    freezer.close()


def test_calls_about_a_frozen_process_do_not_come_back(
    gpu: SimGpu, start: Start, freezer: Freezer
) -> None:
    work = start()
    freezer.freeze(work.pid)
    state = Call(lambda: gpu.library.state(work.pid))
    lock = Call(lambda: gpu.library.lock(work.pid, 50))
    assert state.still_waits()
    assert lock.still_waits()
    assert gpu.library.restore_thread(work.pid)[0] == SUCCESS

    freezer.thaw()
    assert state.finish() in {(SUCCESS, RUNNING), (SUCCESS, LOCKED)}
    assert lock.finish() == SUCCESS
    assert gpu.library.unlock(work.pid) == SUCCESS


def test_a_call_whose_caller_was_killed_is_never_carried_out(
    gpu: SimGpu, start: Start, freezer: Freezer
) -> None:
    work = start()
    freezer.freeze(work.pid)
    call = f"cuCheckpointProcessLock({work.pid}, None)"
    program = f"import ctypes; ctypes.CDLL({str(gpu.kit.libcuda)!r}).{call}"
    caller = subprocess.Popen([sys.executable, "-c", program])
    wait_for("caller in the queue", lambda: "hrtimer" in wchan(caller.pid))
    caller.kill()
    caller.wait()
    freezer.thaw()
    assert gpu.library.state(work.pid) == (SUCCESS, RUNNING)
    work.goes_on()


def test_a_call_ends_with_the_process_it_is_about(gpu: SimGpu, start: Start) -> None:
    work = start("--bytes", str(8 * MIB), SIMGPU_FAULTS=f"speed={MIB}")
    assert gpu.library.lock(work.pid) == SUCCESS
    copy = Call(lambda: gpu.library.checkpoint(work.pid))
    assert copy.still_waits()
    work.kill()
    assert copy.finish() == OPERATING_SYSTEM
    assert gpu.owners() == {}


# --- work in flight -------------------------------------------------------------------------


def test_lock_waits_for_work_in_flight(gpu: SimGpu, start: Start) -> None:
    work = start("--busy-ms", "1000000")

    def refused() -> bool:
        """False while the lock comes before the first launch."""
        code = gpu.library.lock(work.pid, 50)
        return code == NOT_READY or gpu.library.unlock(work.pid) != SUCCESS

    wait_for("lock refused", refused)
    assert gpu.library.state(work.pid) == (SUCCESS, RUNNING)


def test_lock_without_limit_gets_its_turn_between_launches(gpu: SimGpu, start: Start) -> None:
    work = start("--busy-ms", "100", "--tick-ms", "0")
    for _ in range(3):
        assert gpu.library.lock(work.pid) == SUCCESS
        assert gpu.library.unlock(work.pid) == SUCCESS
        work.goes_on()


def test_callers_at_once_are_served_one_by_one(gpu: SimGpu, start: Start) -> None:
    work = start()
    states = [Call(lambda: {gpu.library.state(work.pid) for _ in range(50)}) for _ in range(8)]
    locks = [
        Call(
            lambda: [(gpu.library.lock(work.pid), gpu.library.unlock(work.pid)) for _ in range(20)]
        )
        for _ in range(2)
    ]
    for call in states:
        seen = call.finish()
        assert isinstance(seen, set)
        assert seen <= {(SUCCESS, RUNNING), (SUCCESS, LOCKED)}
    for call in locks:
        pairs = call.finish()
        assert isinstance(pairs, list)
        assert {code for pair in pairs for code in pair} <= {SUCCESS, ILLEGAL_STATE}
    # The last call of all was an unlock.
    assert gpu.library.state(work.pid) == (SUCCESS, RUNNING)
    work.goes_on()


# --- what goes wrong on demand --------------------------------------------------------------


def test_a_lock_never_granted(gpu: SimGpu, start: Start) -> None:
    work = start()
    with gpu.faulty("lock=never", work.pid):
        assert gpu.library.lock(work.pid, 50) == NOT_READY
        assert gpu.library.state(work.pid) == (SUCCESS, RUNNING)
        work.goes_on()
    suspend(gpu, work.pid)
    resume(gpu, work.pid)
    work.goes_on()


@pytest.mark.parametrize("where", ["all", "one", "environment"])
def test_a_copy_that_fails_leaves_the_process_locked(gpu: SimGpu, start: Start, where: str) -> None:
    words = "checkpoint=304"
    work = start(**({"SIMGPU_FAULTS": words} if where == "environment" else {}))
    if where != "environment":
        gpu.fault(words, work.pid if where == "one" else None)
    regions = anonymous_regions(work.pid)
    assert gpu.library.lock(work.pid) == SUCCESS
    assert gpu.library.checkpoint(work.pid) == OPERATING_SYSTEM
    assert gpu.library.state(work.pid) == (SUCCESS, LOCKED)
    assert anonymous_regions(work.pid) == regions
    assert gpu.library.unlock(work.pid) == SUCCESS
    work.goes_on()


def test_a_fault_of_one_process_is_not_another_ones(gpu: SimGpu, start: Start) -> None:
    one, other = start(), start()
    gpu.fault("lock=600", one.pid)
    assert gpu.library.lock(one.pid) == NOT_READY
    assert gpu.library.lock(other.pid) == SUCCESS


def test_a_restore_that_fails_can_be_tried_again(gpu: SimGpu, start: Start) -> None:
    work = start()
    suspend(gpu, work.pid)
    with gpu.faulty("restore=304"):
        assert gpu.library.restore(work.pid) == OPERATING_SYSTEM
        assert gpu.library.state(work.pid) == (SUCCESS, CHECKPOINTED)
        assert gpu.owners() == {}
    resume(gpu, work.pid)
    work.goes_on()


def test_an_unlock_that_fails_leaves_the_process_locked(gpu: SimGpu, start: Start) -> None:
    work = start()
    assert gpu.library.lock(work.pid) == SUCCESS
    with gpu.faulty("unlock=999"):
        assert gpu.library.unlock(work.pid) == 999
    assert gpu.library.state(work.pid) == (SUCCESS, LOCKED)


def test_a_failure_for_good(gpu: SimGpu, start: Start) -> None:
    work = start()
    gpu.fault("checkpoint=failed")
    assert gpu.library.lock(work.pid) == SUCCESS
    assert gpu.library.checkpoint(work.pid) == OPERATING_SYSTEM
    assert gpu.library.state(work.pid) == (SUCCESS, FAILED)
    assert gpu.library.unlock(work.pid) == ILLEGAL_STATE


def test_a_driver_that_hangs_serves_again_when_it_comes_back(gpu: SimGpu, start: Start) -> None:
    work = start()
    with gpu.faulty("lock=hang", work.pid):
        lock = Call(lambda: gpu.library.lock(work.pid, 50))
        assert lock.still_waits()
    assert lock.finish() == SUCCESS
    assert gpu.library.unlock(work.pid) == SUCCESS


# --- memory of the board --------------------------------------------------------------------


@pytest.fixture
def small_gpu(kit: Kit, tmp_path: Path) -> SimGpu:
    return SimGpu(tmp_path / "small", kit, capacity=8 * MIB).create()


def test_the_dead_make_room(small_gpu: SimGpu, tmp_path: Path) -> None:
    six = ["--bytes", str(6 * MIB)]
    one = Workload(small_gpu, tmp_path / "one", *six)
    suspend(small_gpu, one.pid)
    other = Workload(small_gpu, tmp_path / "other", *six)
    other.kill()
    try:
        resume(small_gpu, one.pid)
        one.goes_on()
    finally:
        one.kill()


def test_a_restore_without_room_is_the_last_one(small_gpu: SimGpu, tmp_path: Path) -> None:
    """As on the real driver (docs/gpu.md)."""
    six = ["--bytes", str(6 * MIB)]
    one = Workload(small_gpu, tmp_path / "one", *six)
    suspend(small_gpu, one.pid)
    other = Workload(small_gpu, tmp_path / "other", *six)
    try:
        assert small_gpu.library.restore(one.pid) == OUT_OF_MEMORY
        assert small_gpu.library.state(one.pid) == (SUCCESS, CHECKPOINTED)
        assert small_gpu.owners() == {other.pid: 6 * MIB}
        other.kill()
        assert small_gpu.library.restore(one.pid) == OPERATING_SYSTEM
        assert small_gpu.library.state(one.pid) == (SUCCESS, CHECKPOINTED)
    finally:
        one.kill()
        other.kill()
    assert small_gpu.owners() == {}


def test_an_allocation_needs_room(small_gpu: SimGpu, tmp_path: Path) -> None:
    command = [str(small_gpu.kit.workload), "--bytes", str(9 * MIB)]
    done = subprocess.run(
        command, env=small_gpu.host_env(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, "cuMemAlloc: CUDA error 2" in done.stderr) == (1, True), done.stderr


def test_restore_onto_other_gpus(kit: Kit, tmp_path: Path) -> None:
    gpu = SimGpu(tmp_path / "two", kit, gpus=2, capacity=8 * MIB).create()
    six = ["--bytes", str(6 * MIB)]
    work = Workload(gpu, tmp_path / "status", *six)
    a, b = SimGpu.uuid(0), SimGpu.uuid(1)
    try:
        suspend(gpu, work.pid)
        assert gpu.library.restore(work.pid, [(a, b)]) == INVALID_VALUE
        assert gpu.library.restore(work.pid, [(a, b), (b, b)]) == INVALID_VALUE
        assert gpu.library.restore(work.pid, [(a, a), (b, SimGpu.uuid(7))]) == INVALID_DEVICE
        assert gpu.library.state(work.pid) == (SUCCESS, CHECKPOINTED)
        assert gpu.library.restore(work.pid, [(a, b), (b, a)]) == SUCCESS
        assert gpu.library.unlock(work.pid) == SUCCESS
        work.goes_on()
        # Its GPU is now the other one, and the first has no room.
        suspend(gpu, work.pid)
        other = Workload(gpu, tmp_path / "other", *six)
        try:
            assert gpu.library.restore(work.pid, [(b, a), (a, b)]) == OUT_OF_MEMORY
        finally:
            other.kill()
    finally:
        work.kill()
