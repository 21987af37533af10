"""A restore for which device memory is wanting is not asked of the driver: it would be the last."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shim.cuda import engine, states
from shim.cuda.driver import Driver
from shim.cuda.engine import Policy
from shim.cuda.errors import CudaError
from shim.cuda.survey import Survey
from shim.cuda.suspension import Suspension
from tests.cuda.conftest import MIB, new_policy
from tests.cuda.simulated import Workload
from tests.cuda.test_suspend import pids_of, state_of
from tests.simgpu.simgpu import SimGpu

Start = Callable[..., Workload]


@pytest.fixture
def one(workload: Start) -> Workload:
    return workload()


@pytest.fixture
def suspension(one: Workload, driver: Driver, policy: Policy) -> Suspension:
    return engine.suspend(pids_of(one), driver, policy)


@pytest.fixture
def other(suspension: Suspension, board: SimGpu, workload: Start) -> Workload:
    """Has taken nearly all of the GPU while `one` was suspended."""
    new = workload(cuda=False)
    new.do("init")
    new.do(f"hold {board.capacity - 2 * MIB}")
    return new


def test_what_a_process_held_is_known_by_gpu(suspension: Suspension, board: SimGpu) -> None:
    (process,) = suspension.processes
    assert list(process.gpus.values()) == [process.held_bytes] == [4 * MIB]


def test_nothing_is_asked_of_the_driver_and_nothing_lost(
    one: Workload, suspension: Suspension, other: Workload, driver: Driver, policy: Policy
) -> None:
    with pytest.raises(CudaError) as caught:
        engine.resume(suspension, driver, new_policy(lock_timeout=0))
    told = str(caught.value)
    assert f"pid {one.pid}" in told
    assert f"in use by pid {other.pid}" in told
    assert "has 2 MiB free and 4 MiB are needed" in told
    assert caught.value.states == {one.pid: states.CHECKPOINTED}
    assert state_of(driver, one.pid) == states.CHECKPOINTED

    other.kill()
    engine.resume(suspension, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING


def test_memory_that_is_freed_meanwhile_is_waited_for(
    one: Workload,
    suspension: Suspension,
    other: Workload,
    driver: Driver,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = threading.Event()
    survey = driver.survey

    def watched(pids: list[int] | None, *, timeout: float) -> Survey:
        try:
            return survey(pids, timeout=timeout)
        finally:
            looked.set()

    monkeypatch.setattr(driver, "survey", watched)
    resuming = threading.Thread(target=engine.resume, args=(suspension, driver, policy))
    resuming.start()
    assert looked.wait(30)
    assert state_of(driver, one.pid) == states.CHECKPOINTED
    other.kill()
    resuming.join()
    assert state_of(driver, one.pid) == states.RUNNING


def test_where_nvml_says_nothing_the_driver_is_asked(
    one: Workload,
    suspension: Suspension,
    driver: Driver,
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "survey", lambda pids, *, timeout: Survey(unknown="no NVML"))
    engine.resume(suspension, driver, policy)
    assert state_of(driver, one.pid) == states.RUNNING
