"""Suspend and resume on real processes that use the simulated GPU: all or none, by the driver's
own word, in parallel, and bounded in time whatever hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.cuda import discovery, engine, states
from shim.cuda.driver import Driver
from shim.cuda.engine import Policy
from shim.cuda.errors import CudaError, HelperDied
from shim.cuda.suspension import Process, Suspension
from tests.cuda.conftest import MIB, new_policy
from tests.cuda.freezer import Freezer
from tests.cuda.simulated import Workload
from tests.cuda.waiting import until
from tests.simgpu.simgpu import SimGpu

Start = Callable[..., Workload]


def state_of(driver: Driver, pid: int) -> str:
    answer = driver.call("state", pid, timeout=30)
    return states.word(answer.value) if answer.ok else answer.name


def pids_of(*workloads: Workload) -> Callable[[], list[int]]:
    return lambda: [one.pid for one in workloads]


def helpers() -> list[int]:
    """Pids of the helper processes that this process has, zombies too."""
    found = []
    children: list[str] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended
            children += (task / "children").read_text().split()
    for child in children:
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"shim.cuda.helper" in line or not line:
                found.append(int(child))
    return found


def test_a_life_cycle(board: SimGpu, workload: Start, driver: Driver, policy: Policy) -> None:
    one = workload()
    digest = one.do("digest")

    suspension = engine.suspend(pids_of(one), driver, policy)

    (process,) = suspension.processes
    assert suspension.engine == "driver"
    assert (process.before, process.state) == (states.RUNNING, states.CHECKPOINTED)
    assert state_of(driver, one.pid) == states.CHECKPOINTED
    assert not discovery.holds_devices(one.pid)
    assert process.device_bytes == 4 * MIB and process.note == ""
    assert process.region in discovery.anonymous_memory(one.pid)
    assert asked_for_huge_pages(one.pid, process.region)
    assert process.restore_tid in map(int, os.listdir(f"/proc/{one.pid}/task"))
    assert process.restore_tid != one.pid

    engine.resume(suspension, driver, policy)
    engine.resume(suspension, driver, policy)  # a second time changes nothing
    assert process.state == state_of(driver, one.pid) == states.RUNNING
    assert one.do("digest") == digest


def test_a_suspension_survives_json(workload: Start, driver: Driver, policy: Policy) -> None:
    one, idle = workload(), workload(cuda=False)
    suspension = engine.suspend(pids_of(one, idle), driver, policy)
    plain = json.loads(json.dumps(suspension.to_dict()))
    twin = Suspension.from_dict(plain)
    assert twin.to_dict() == suspension.to_dict() and twin
    engine.resume(twin, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_four_processes_are_locked_and_copied_at_the_same_time(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    four = [workload() for _ in range(4)]
    board.fault(f"speed={8 * MIB}")  # half a second for each

    suspension = engine.suspend(pids_of(*four), driver, policy)

    steps = [process.steps["checkpoint"] for process in suspension.processes]
    assert len(steps) == 4
    last_start = max(step["at"] for step in steps)
    first_end = min(step["at"] + step["seconds"] for step in steps)
    assert last_start < first_end, "one copy ended before another began"
    engine.resume(suspension, driver, policy)
    assert {state_of(driver, one.pid) for one in four} == {states.RUNNING}


def test_without_a_cuda_process_nothing_is_started_and_nothing_asked(
    driver: Driver, policy: Policy
) -> None:
    with subprocess.Popen(["sleep", "600"]) as sleeper:
        suspension = engine.suspend(lambda: [sleeper.pid], driver, policy)
        sleeper.kill()
    assert not suspension and suspension.engine == "none"
    assert helpers() == []


def test_a_process_that_has_the_library_but_no_cuda_is_left_alone(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    idle = workload(cuda=False)
    suspension = engine.suspend(pids_of(idle), driver, policy)
    assert not suspension
    assert [pid for pid, _, _ in suspension.idle] == [idle.pid]


def test_an_image_with_a_libcuda_runs_on_a_node_without_a_driver(
    workload: Start, policy: Policy, tmp_path: Path
) -> None:
    idle = workload(cuda=False)
    nowhere = Driver(sys.executable, str(tmp_path / "libcuda.so.1"))
    assert not engine.suspend(pids_of(idle), nowhere, policy)
    busy = workload()
    with pytest.raises(CudaError, match="cannot be loaded"):
        engine.suspend(pids_of(busy), nowhere, policy)


def test_a_lock_that_is_never_granted_names_the_pid_and_everything_runs_again(
    board: SimGpu, workload: Start, driver: Driver
) -> None:
    good, stuck = workload(), workload()
    board.fault("lock=never", stuck.pid)

    with pytest.raises(CudaError) as caught:
        engine.suspend(pids_of(good, stuck), driver, new_policy(lock_timeout=1))

    text = str(caught.value)
    assert f"pid {stuck.pid}" in text and "not locked within 1 s" in text
    assert "work in flight did not end" in text
    assert f"pid {good.pid} ({comm(good)}) running again" in text
    assert caught.value.states == {good.pid: states.RUNNING, stuck.pid: states.RUNNING}
    for one in (good, stuck):
        assert state_of(driver, one.pid) == states.RUNNING
        one.do("digest")

    board.fault("", stuck.pid)
    again = engine.suspend(pids_of(good, stuck), driver, new_policy())
    assert len(again.processes) == 2


def test_work_in_flight_is_waited_for(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    begun = time.monotonic()
    one.do("busy 3000")
    engine.suspend(pids_of(one), driver, policy)
    assert time.monotonic() - begun >= 3  # at the least: there is no upper bound


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("checkpoint=304", "CUDA_ERROR_OPERATING_SYSTEM"), ("checkpoint=2", "OUT_OF_MEMORY")],
)
def test_a_copy_that_fails_undoes_all_of_them(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy, fault: str, reason: str
) -> None:
    three = [workload() for _ in range(3)]
    digests = [one.do("digest") for one in three]
    board.fault(fault, three[1].pid)

    with pytest.raises(CudaError, match=reason) as caught:
        engine.suspend(pids_of(*three), driver, policy)

    assert f"pid {three[1].pid}" in str(caught.value)
    assert set(caught.value.states.values()) == {states.RUNNING}
    assert [state_of(driver, one.pid) for one in three] == [states.RUNNING] * 3
    assert [one.do("digest") for one in three] == digests


def test_a_process_that_the_driver_gave_up_is_reported_as_failed_and_the_others_run(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    good, bad = workload(), workload()
    board.fault("checkpoint=failed", bad.pid)
    with pytest.raises(CudaError, match="Not undone") as caught:
        engine.suspend(pids_of(good, bad), driver, policy)
    assert caught.value.states == {good.pid: states.RUNNING, bad.pid: states.FAILED}
    board.fault("", bad.pid)
    with pytest.raises(CudaError, match="state failed") as caught:
        engine.suspend(pids_of(good, bad), driver, policy)
    assert state_of(driver, good.pid) == states.RUNNING


def test_what_somebody_else_had_locked_or_copied_is_left_as_found(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    free, locked, copied = workload(), workload(), workload()
    for pid, action, argument in (
        (locked.pid, "lock", "0"),
        (copied.pid, "lock", "0"),
        (copied.pid, "checkpoint", ""),
    ):
        assert driver.call(action, pid, timeout=30, argument=argument).ok

    suspension = engine.suspend(pids_of(free, locked, copied), driver, policy)

    assert {p.state for p in suspension.processes} == {states.CHECKPOINTED}
    assert {p.pid: p.before for p in suspension.processes} == {
        free.pid: states.RUNNING,
        locked.pid: states.LOCKED,
        copied.pid: states.CHECKPOINTED,
    }
    engine.resume(suspension, driver, policy)
    assert state_of(driver, free.pid) == states.RUNNING
    assert state_of(driver, locked.pid) == states.LOCKED
    assert state_of(driver, copied.pid) == states.CHECKPOINTED


def test_a_failure_undoes_only_what_was_done(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    locked, bad = workload(), workload()
    assert driver.call("lock", locked.pid, timeout=30, argument="0").ok
    board.fault("checkpoint=304", bad.pid)
    with pytest.raises(CudaError) as caught:
        engine.suspend(pids_of(locked, bad), driver, policy)
    assert caught.value.states == {locked.pid: states.LOCKED, bad.pid: states.RUNNING}
    assert state_of(driver, locked.pid) == states.LOCKED


def test_when_the_pids_cannot_be_had_any_more_all_is_undone(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    looks = iter([[one.pid]])

    def pids() -> list[int]:
        for found in looks:
            return found
        assert state_of(driver, one.pid) == states.LOCKED
        raise OSError("the cgroup is gone")

    with pytest.raises(CudaError, match="the cgroup is gone"):
        engine.suspend(pids, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_the_plugin_engine_only_locks(workload: Start, driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "cuda_plugin.so").touch()
    policy = new_policy(engine="plugin")
    policy.plugin_dir = str(tmp_path)
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    assert suspension.engine == "plugin"
    assert state_of(driver, one.pid) == suspension.processes[0].state == states.LOCKED
    assert suspension.processes[0].restore_tid
    engine.resume(suspension, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_on_an_old_driver_the_plugin_engine_locks_through_nvidias_command(
    board: SimGpu,
    workload: Start,
    driver: Driver,
    old_libcuda: Path,
    nvidia_command: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "cuda_plugin.so").touch()
    policy = new_policy(engine="auto")
    policy.plugin_dir = str(tmp_path)
    old = Driver(sys.executable, str(old_libcuda), str(nvidia_command))
    one, idle = workload(), workload(cuda=False)

    suspension = engine.suspend(pids_of(one, idle), old, policy)

    assert suspension.engine == "plugin"
    assert [p.pid for p in suspension.processes] == [one.pid]
    assert state_of(driver, one.pid) == states.LOCKED
    engine.resume(suspension, old, policy)
    assert state_of(driver, one.pid) == states.RUNNING
    board.fault("lock=304", one.pid)
    with pytest.raises(CudaError, match=f"--action lock: exit status 1: .*{one.pid}.*304"):
        engine.suspend(pids_of(one), old, policy)
    old.close()


def test_a_process_that_gets_cuda_during_the_suspension_is_taken_too(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    """The second process initialises CUDA when the first is already locked."""
    first, second = workload(), workload(cuda=False)
    looks = 0

    def pids() -> list[int]:
        nonlocal looks
        looks += 1
        if looks == 2:
            assert state_of(driver, first.pid) == states.LOCKED
            second.do("init")
        return [first.pid, second.pid]

    suspension = engine.suspend(pids, driver, policy)
    assert {p.pid: p.state for p in suspension.processes} == {
        first.pid: states.CHECKPOINTED,
        second.pid: states.CHECKPOINTED,
    }


def test_a_process_that_gets_cuda_while_others_are_copied_is_taken_too(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    first, second = workload(), workload(cuda=False)

    done = False

    def once() -> list[int]:
        nonlocal done
        if not done and state_of(driver, first.pid) == states.CHECKPOINTED:
            done = True
            second.do("init")
        return [first.pid, second.pid]

    suspension = engine.suspend(once, driver, policy)
    assert {p.pid: p.state for p in suspension.processes} == {
        first.pid: states.CHECKPOINTED,
        second.pid: states.CHECKPOINTED,
    }


def test_a_child_forked_from_a_cuda_process_has_no_cuda_of_its_own(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    parent = workload()
    child = int(parent.do("fork"))
    suspension = engine.suspend(lambda: [parent.pid, child], driver, policy)
    assert [p.pid for p in suspension.processes] == [parent.pid]
    assert child in [pid for pid, _, _ in suspension.idle]
    assert suspension.forked == {child: ""}
    assert not discovery.holds_devices(child)
    assert not engine.missed(suspension, [parent.pid, child])
    os.kill(child, signal.SIGKILL)


def test_a_process_in_a_nested_pid_namespace_is_taken_by_its_host_pid(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    plain = workload()
    outer = workload(before=("unshare", "--pid", "--fork"))
    (nested,) = map(int, Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())
    suspension = engine.suspend(lambda: [plain.pid, outer.pid, nested], driver, policy)
    assert [p.pid for p in suspension.processes] == sorted([plain.pid, nested])
    record = next(p for p in suspension.processes if p.pid == nested)
    assert record.inner == (1,)
    engine.resume(suspension, driver, policy)
    assert state_of(driver, nested) == states.RUNNING


def test_a_process_that_dies_meanwhile_is_no_error(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    stays, dies = workload(), workload()
    board.fault("checkpoint=hang", dies.pid)  # so that it is in the middle of its copy
    copying = threading.Thread(target=kill_when_locked, args=(driver, stays, dies))
    copying.start()
    suspension = engine.suspend(pids_of(stays, dies), driver, policy)
    copying.join()
    assert [p.pid for p in suspension.processes] == [stays.pid]
    stays.kill()
    engine.resume(suspension, driver, policy)
    assert suspension.processes[0].state == engine.GONE


def kill_when_locked(driver: Driver, stays: Workload, dies: Workload) -> None:
    until(lambda: state_of(driver, stays.pid) == states.CHECKPOINTED)
    os.kill(dies.pid, signal.SIGKILL)


def test_a_helper_killed_in_the_middle_is_an_error_and_a_new_one_undoes(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    good, slow = workload(), workload()
    board.fault(f"speed={2 * MIB}", slow.pid)  # its copy takes two seconds

    def kill_helper() -> None:
        other = Driver(*driver._arguments)
        until(lambda: state_of(other, good.pid) == states.CHECKPOINTED)
        ours = {pid for pid in helpers() if pid != other._helpers["calls"].pid}
        for pid in ours:
            os.kill(pid, signal.SIGKILL)
        other.close()

    killer = threading.Thread(target=kill_helper)
    killer.start()
    with pytest.raises(CudaError, match=r"helper \(pid \d+\) was killed or crashed") as caught:
        engine.suspend(pids_of(good, slow), driver, policy)
    killer.join()
    assert f"pid {slow.pid}" in str(caught.value)
    assert set(caught.value.states.values()) == {states.RUNNING}
    assert state_of(driver, good.pid) == state_of(driver, slow.pid) == states.RUNNING


def test_a_helper_that_dies_while_the_gpu_comes_back_is_followed_by_another(
    workload: Start, driver: Driver, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was asked for the room there is; nobody else would give the GPU back."""
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)

    def dies(*_: object, **__: object) -> None:
        monkeypatch.undo()
        (helper,) = helpers()
        os.kill(helper, signal.SIGKILL)
        raise HelperDied("killed")

    monkeypatch.setattr(driver, "survey", dies)
    engine.resume(suspension, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_a_driver_that_hangs_is_reported_and_given_up(
    board: SimGpu, workload: Start, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "PATIENT_SECONDS", 1)
    good, hung = workload(), workload()
    board.fault("checkpoint=hang", hung.pid)
    with pytest.raises(CudaError) as caught:
        engine.suspend(pids_of(good, hung), driver, new_policy(copy_timeout=1))
    text = str(caught.value)
    assert re.search(rf"pid {hung.pid}: the driver's checkpoint call did not come back", text)
    assert caught.value.states[good.pid] == states.RUNNING
    assert caught.value.states[hung.pid].startswith("unknown: ")
    assert state_of(driver, good.pid) == states.RUNNING
    until(lambda: len(helpers()) == 1)  # the one that the last question started

    board.fault("", hung.pid)
    until(lambda: state_of(driver, hung.pid) == states.LOCKED)
    assert driver.call("unlock", hung.pid, timeout=30).ok


def test_a_frozen_process_is_never_asked(
    workload: Start, driver: Driver, policy: Policy, freezer: Freezer
) -> None:
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    freezer.add(one.pid)
    with freezer.frozen():
        driver.close()
        until(lambda: helpers() == [])
        assert engine.missed(suspension, [one.pid]) == []
        assert [c.pid for c in discovery.candidates([one.pid])] == [one.pid]
        with pytest.raises(CudaError, match="frozen by cgroup") as caught:
            engine.resume(suspension, driver, policy)
        assert caught.value.states[one.pid].startswith("unknown: ")
        assert helpers() == []
    engine.resume(suspension, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_missed_tells_who_got_cuda_after_the_suspension(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    first, second = workload(), workload(cuda=False)
    suspension = engine.suspend(pids_of(first, second), driver, policy)
    assert engine.missed(suspension, [first.pid, second.pid]) == []
    second.do("init")
    assert [c.pid for c in engine.missed(suspension, [first.pid, second.pid])] == [second.pid]


def test_who_held_a_device_without_cuda_all_along_is_not_missed(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    """As a monitor does, through NVML."""
    with (board.directory / "dev" / "nvidia0").open() as device:
        monitor = subprocess.Popen(["sleep", "600"], pass_fds=[device.fileno()])
    suspension = engine.suspend(lambda: [monitor.pid], driver, policy)
    assert not suspension
    assert engine.missed(suspension, [monitor.pid]) == []
    monitor.kill()
    monitor.wait()


def test_another_process_under_a_recorded_pid_is_not_touched(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    suspension.processes[0].start_time -= 1
    engine.resume(suspension, driver, policy)
    assert suspension.processes[0].state == engine.GONE
    assert state_of(driver, one.pid) == states.CHECKPOINTED


def test_a_restore_that_fails_leaves_the_others_running_and_can_be_tried_again(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    good, bad = workload(), workload()
    suspension = engine.suspend(pids_of(good, bad), driver, policy)
    board.fault("restore=2", bad.pid)
    with pytest.raises(CudaError, match=f"pid {bad.pid}.*OUT_OF_MEMORY") as caught:
        engine.resume(suspension, driver, policy)
    assert caught.value.states == {good.pid: states.RUNNING, bad.pid: states.CHECKPOINTED}
    board.fault("", bad.pid)
    engine.resume(suspension, driver, policy)
    assert state_of(driver, bad.pid) == states.RUNNING


def test_restored_processes_are_found_by_their_pids_inside_the_container(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    """The same process stands for the restored one: its host pid on record is another's."""
    outer = workload(before=("unshare", "--pid", "--fork"))
    (nested,) = map(int, Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split())
    suspension = engine.suspend(lambda: [nested], driver, policy)
    (record,) = suspension.processes
    record.pid, record.start_time = 1, 1

    (back,) = engine.resume_restored(
        lambda: [outer.pid, nested], [record], driver, policy, engine="driver"
    )
    assert (back.pid, back.state) == (nested, states.RUNNING)
    assert state_of(driver, nested) == states.RUNNING


def test_a_process_that_did_not_come_back_is_named_and_the_others_run(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    absent = Process(4242, 1, (77,), "trainer", before=states.RUNNING)
    with pytest.raises(CudaError, match=r"4242 \(trainer\), 77 inside the container") as caught:
        engine.resume_restored(
            pids_of(one), [*suspension.processes, absent], driver, policy, engine="driver"
        )
    assert caught.value.states == {one.pid: states.RUNNING}


def test_a_restored_process_without_cuda_has_not_come_back(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    idle = workload(cuda=False)
    found = discovery.identify(idle.pid)
    record = Process(1, 1, found.inner, found.comm, before=states.RUNNING)
    with pytest.raises(CudaError, match="without CUDA after the restore, not running"):
        engine.resume_restored(pids_of(idle), [record], driver, policy, engine="driver")


def test_with_the_plugin_engine_a_restored_process_must_run_by_then(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    with pytest.raises(CudaError, match="checkpointed after the restore"):
        engine.resume_restored(pids_of(one), suspension.processes, driver, policy, engine="plugin")
    assert state_of(driver, one.pid) == states.CHECKPOINTED


def test_a_device_map_must_name_the_gpu(
    board: SimGpu, workload: Start, driver: Driver, policy: Policy
) -> None:
    one = workload()
    suspension = engine.suspend(pids_of(one), driver, policy)
    other = "GPU-00000000-0000-0000-0000-000000000001"

    def restore(device_map: str) -> None:
        engine.resume_restored(
            pids_of(one),
            suspension.processes,
            driver,
            policy,
            engine="driver",
            device_map=device_map,
        )

    with pytest.raises(CudaError, match="INVALID_VALUE"):
        restore(f"{other}={other}")
    with pytest.raises(CudaError, match="not OLD=NEW"):
        restore("nonsense")
    restore(f"GPU-{board.uuid(0)}=GPU-{board.uuid(0)}")
    assert state_of(driver, one.pid) == states.RUNNING


def test_nothing_is_left_open_or_unreaped(board: SimGpu, workload: Start, driver: Driver) -> None:
    one = workload()
    driver.library()
    driver.close()
    until(lambda: not helpers())
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    board.fault("lock=hang", one.pid)
    for _ in range(3):
        with pytest.raises(CudaError):
            driver.call("lock", one.pid, timeout=0.2, argument="100")
    driver.close()
    until(lambda: not helpers())
    until(lambda: (set(os.listdir("/proc/self/fd")), threading.active_count()) == before)


def comm(workload: Workload) -> str:
    return discovery.identify(workload.pid).comm


def asked_for_huge_pages(pid: int, region: tuple[int, int]) -> bool:
    _, _, rest = Path(f"/proc/{pid}/smaps").read_text().partition(f"{region[0]:x}-{region[1]:x} ")
    return " hg" in rest.partition("VmFlags:")[2].partition("\n")[0]
