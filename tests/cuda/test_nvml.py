"""How much device memory a process holds, by NVML: the simulated one, and ones that do not know."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.cuda import engine, nvml, states
from shim.cuda._libnvml import ffi
from shim.cuda.driver import Driver
from shim.cuda.engine import Policy
from shim.cuda.errors import CallAbandoned, CudaError
from shim.cuda.survey import Survey
from shim.cuda.suspension import Process
from tests.cuda.conftest import MIB
from tests.cuda.simulated import Workload
from tests.simgpu.simgpu import SimGpu

Start = Callable[..., Workload]

# One that says what `figure` says of pid 77, on two devices.
LIBRARY = """
#include <stddef.h>
#include <stdio.h>
struct info {{ unsigned pid; unsigned long long used; unsigned gpu, compute; }};
const char *nvmlErrorString(int code) {{ (void)code; return "Driver Not Loaded"; }}
int nvmlInit_v2(void) {{ return {init}; }}
int nvmlShutdown(void) {{ return 0; }}
int nvmlDeviceGetCount_v2(unsigned *count) {{ *count = 2; return 0; }}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device)
{{ *device = (void *)(size_t)(index + 1); return 0; }}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned room)
{{ snprintf(uuid, room, "GPU-%zu", (size_t)device); return 0; }}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory)
{{ (void)device; memory[0] = 300; memory[1] = 100; memory[2] = 200; return 0; }}
int nvmlDeviceGetComputeRunningProcesses_{version}(void *device, unsigned *count, struct info *to)
{{
    (void)device;
    unsigned room = *count;
    *count = 40;
    if (room < *count) return 7;
    for (unsigned i = 0; i < 40; i++) to[i] = (struct info){{100 + i, 1, 0, 0}};
    to[39] = (struct info){{77, {figure}, 0, 0}};
    return 0;
}}
"""


def library(place: Path, *, figure: str = "0", init: int = 0, version: str = "v3") -> str:
    """Builds one; returns the path of the libcuda that it lies beside."""
    source = place / "nvml.c"
    source.write_text(LIBRARY.format(figure=figure, init=init, version=version))
    built = place / nvml.LIBRARY
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", built, source], check=True)
    return str(place / "libcuda.so.1")


def test_the_structure_has_nvmls_layout() -> None:
    assert ffi.sizeof("process_memory") == 24
    assert ffi.offsetof("process_memory", "used") == 8


def test_all_gpus_are_counted_and_many_processes_fit(tmp_path: Path) -> None:
    libcuda = library(tmp_path, figure=f"{3 * MIB}ULL * 4096")
    found = nvml.survey({77}, libcuda)
    assert found.used(77) == 2 * 3 * MIB * 4096
    assert found.used_on("GPU-2") == 3 * MIB * 4096
    assert [(d.uuid, d.total, d.free, d.mig) for d in found.devices] == [
        ("GPU-1", 300, 100, False),
        ("GPU-2", 300, 100, False),
    ]


def test_a_survey_survives_its_line_of_text(tmp_path: Path) -> None:
    found = nvml.survey({77, 100}, library(tmp_path, figure="-1ULL"))
    again = Survey.decode(found.encode())
    assert again.encode() == found.encode()
    assert (again.used(77), again.used(100), again.used(1)) == (None, 2, None)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"init": 9}, r"nvmlInit_v2: Driver Not Loaded \(9\)"),
        ({"version": "v1"}, "older than r510"),
    ],
)
def test_what_nvml_does_not_know_is_unknown(
    tmp_path: Path, options: dict[str, str], why: str
) -> None:
    libcuda = library(tmp_path, **options)  # type: ignore[arg-type]
    with pytest.raises(nvml.Unknown, match=why):
        nvml.survey({77}, libcuda)


def test_a_process_that_is_not_listed_is_unknown(tmp_path: Path) -> None:
    assert nvml.survey({76}, library(tmp_path)).used(76) is None


def test_without_nvml_the_loaders_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(nvml.Unknown, match=r"libnvidia-ml\.so\.1: cannot open"):
        nvml.survey({77}, str(tmp_path / "libcuda.so.1"))


def test_a_suspended_process_had_what_it_held(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    big, small, bare = workload(), workload(), workload(cuda=False)
    big.do(f"hold {2 * MIB}")
    bare.do("init")
    suspension = engine.suspend(lambda: [big.pid, small.pid, bare.pid], driver, policy)
    held = {process.pid: process.held_bytes for process in suspension.processes}
    assert held == {big.pid: 6 * MIB, small.pid: 4 * MIB, bare.pid: 0}
    copied = {process.pid: process.device_bytes for process in suspension.processes}
    assert copied[big.pid] == held[big.pid] and copied[small.pid] == held[small.pid]


def test_the_caller_is_asked_between_lock_and_copy_and_may_refuse(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    one, two = workload(), workload()
    asked: list[dict[int, str]] = []

    def refuse(processes: list[Process]) -> None:
        asked.append({process.pid: process.state for process in processes})
        assert all(process.held_bytes == 4 * MIB for process in processes)
        raise RuntimeError("no room for it")

    with pytest.raises(CudaError, match=r"no room for it.*running again") as caught:
        engine.suspend(lambda: [one.pid, two.pid], driver, policy, before_copy=refuse)
    assert asked == [{one.pid: states.LOCKED, two.pid: states.LOCKED}]
    assert caught.value.states == {one.pid: states.RUNNING, two.pid: states.RUNNING}
    one.do("digest")


def test_a_process_that_comes_later_is_asked_about_alone(
    workload: Start, driver: Driver, policy: Policy
) -> None:
    first, second = workload(), workload(cuda=False)
    asked: list[list[int]] = []

    def note(processes: list[Process]) -> None:
        asked.append([process.pid for process in processes])
        if len(asked) == 1:
            second.do("init")

    engine.suspend(lambda: [first.pid, second.pid], driver, policy, before_copy=note)
    assert asked == [[first.pid], [second.pid]]


def test_a_nvml_that_fails_or_hangs_is_no_reason_to_give_up(
    board: SimGpu, workload: Start, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = workload()

    class Deaf(Driver):
        def call(self, action: str, pid: int, *, timeout: float, argument: str = "") -> object:  # type: ignore[override]
            if action == "survey":
                raise CallAbandoned(f"pid {pid}: survey did not come back")
            return super().call(action, pid, timeout=timeout, argument=argument)

    driver = Deaf(sys.executable, str(board.kit.libcuda))
    (process,) = engine.suspend(lambda: [one.pid], driver, policy).processes
    assert (process.held_bytes, process.state) == (None, states.CHECKPOINTED)
    assert "did not come back" in process.note
    driver.close()
