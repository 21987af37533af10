"""NVML in this process: how much device memory another process has in use.

For the helper process only. NVML asks the kernel's driver, not the process, so unlike libcuda's
checkpoint calls it answers about one that is locked or stands still. It is initialised and shut
down for each question: it holds the GPU's device files open in between.
"""

from __future__ import annotations

import os
from typing import Any

from shim.cuda._libnvml import ffi

LIBRARY = "libnvidia-ml.so.1"

# nvml.h: nvmlReturn_t, and the figure where the driver does not keep one (vGPU, WSL).
_SUCCESS = 0
_INSUFFICIENT_SIZE = 7
_NOT_AVAILABLE = 2**64 - 1

_ROOM_TO_GROW = 16  # processes that may start between two questions


class UnknownMemory(Exception):
    """How much device memory the process has in use cannot be had; the text says why."""


def used(pid: int, libcuda: str) -> int:
    """Bytes of device memory that process `pid` has in use, contexts included, on all GPUs.

    `libcuda` is the library in use, beside which NVML is looked for first. Raises UnknownMemory."""
    library = _load(libcuda)
    try:
        _check(library, "nvmlInit_v2")
        try:
            figures = _figures(library, pid)
        finally:
            library.nvmlShutdown()
    except (AttributeError, ffi.error) as error:
        raise UnknownMemory(f"{LIBRARY} is older than r510: {error}") from error
    if not figures:
        raise UnknownMemory("NVML does not list it among the processes that use a GPU")
    if _NOT_AVAILABLE in figures:
        raise UnknownMemory("NVML lists it, with its memory as not available")
    return sum(figures)


def _load(libcuda: str) -> Any:
    beside = os.path.join(os.path.dirname(libcuda), LIBRARY)
    for path in dict.fromkeys((beside, LIBRARY)):
        try:
            return ffi.dlopen(path)
        except OSError as error:
            why = error
    raise UnknownMemory(f"NVML cannot be loaded: {why}")


def _figures(library: Any, pid: int) -> list[int]:
    """One for each GPU, or MIG instance of a GPU, on which the process is listed."""
    count = ffi.new("unsigned int *")
    _check(library, "nvmlDeviceGetCount_v2", count)
    figures = []
    for index in range(count[0]):
        device = ffi.new("void **")
        _check(library, "nvmlDeviceGetHandleByIndex_v2", index, device)
        figures += [entry.used for entry in _processes(library, device[0]) if entry.pid == pid]
    return figures


def _processes(library: Any, device: Any) -> Any:
    count: Any = ffi.new("unsigned int *")
    call = "nvmlDeviceGetComputeRunningProcesses_v3"
    room = 0
    while True:
        entries = ffi.new("process_memory[]", room) if room else ffi.NULL
        count[0] = room
        if _check(library, call, device, count, entries, also=_INSUFFICIENT_SIZE) == _SUCCESS:
            return entries[0 : count[0]] if room else []
        room = count[0] + _ROOM_TO_GROW


def _check(library: Any, call: str, *arguments: object, also: int = _SUCCESS) -> int:
    code = int(getattr(library, call)(*arguments))
    if code not in (_SUCCESS, also):
        text: Any = ffi.string(library.nvmlErrorString(code))
        raise UnknownMemory(f"{call}: {text.decode()} ({code})")
    return code
