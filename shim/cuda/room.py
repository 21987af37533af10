"""Whether the device memory that processes are to get back is free, asked before the driver is.

A driver's restore that runs out of memory fails, and so does every one after it, also when there is
memory again: the process is lost (H100, r580.159: CUDA_ERROR_OUT_OF_MEMORY, from then on
CUDA_ERROR_OPERATING_SYSTEM). While nothing was asked of the driver, nothing is lost. Lean: runs in
the shim.
"""

from __future__ import annotations

import time

from shim.cuda.errors import CudaError

TYPE_CHECKING = False  # as in `engine`
if TYPE_CHECKING:
    from shim.cuda.driver import Driver
    from shim.cuda.survey import Survey
    from shim.cuda.suspension import Process

_SLACK = 64  # NVML's figures for processes and for the GPU may differ by this part of the first
_MOST_SLACK = 32 << 20  # bytes

_SURVEY_SECONDS = 10.0
_LOOK_SECONDS = 0.25  # between two looks while there is too little


def wait_for_room(processes: list[Process], driver: Driver, seconds: float) -> None:
    """Returns when every GPU has as much memory free as these processes held on it, or where that
    is not known. Raises CudaError, which says who has the memory, if it has not after `seconds`."""
    need = needed(processes)
    deadline = time.monotonic() + seconds
    while need:
        survey = driver.survey(None, timeout=_SURVEY_SECONDS)
        short = _short(need, survey)
        if not short:
            return
        if time.monotonic() > deadline:
            who = ", ".join(map(str, processes))
            raise CudaError(
                f"{who}: not enough device memory is free to restore it within {seconds:.0f} s: "
                f"{'; '.join(short)}. The driver was not asked, since a process whose restore "
                "runs out of memory is lost. It keeps its memory on the host: free device memory "
                "and resume again",
                {process.pid: process.state for process in processes},
            )
        time.sleep(_LOOK_SECONDS)


def needed(processes: list[Process]) -> dict[str, int]:
    """Bytes by GPU UUID, as far as is known."""
    need: dict[str, int] = {}
    for process in processes:
        for uuid, held in process.gpus.items():
            need[uuid] = need.get(uuid, 0) + held - min(held // _SLACK, _MOST_SLACK)
    return need


def _short(need: dict[str, int], survey: Survey) -> list[str]:
    """What is wanting on each GPU that has too little free, and who holds it."""
    texts = []
    for device in survey.devices:
        wanted = need.get(device.uuid, 0)
        if device.free < wanted:
            holders = ", ".join(
                f"pid {use.pid} ({_mib(use.bytes or 0)})"
                for use in survey.uses
                if use.uuid == device.uuid
            )
            texts.append(
                f"{device.uuid} has {_mib(device.free)} free and {_mib(wanted)} are needed; in use "
                f"by {holders or 'nobody that NVML names'}"
            )
    return texts


def _mib(bytes_: int) -> str:
    return f"{bytes_ / (1 << 20):.0f} MiB"
