"""NVML in this process: the node's GPUs, and what other processes have in use on them.

For the helper process only. NVML asks the kernel's driver, not the process, so unlike libcuda's
checkpoint calls it answers about one that is locked or stands still. It is initialised and shut
down for each question: it holds the GPU's device files open in between.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shim.cuda._libnvml import ffi
from shim.cuda.survey import Device, Survey, Use

LIBRARY = "libnvidia-ml.so.1"

# nvml.h: nvmlReturn_t, and the figure where the driver does not keep one (vGPU, WSL).
_SUCCESS = 0
_INSUFFICIENT_SIZE = 7
_NOT_AVAILABLE = 2**64 - 1
_NO_INSTANCE = 2**32 - 1  # of a process that is on a whole GPU
_UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE

_COMPUTE = "nvmlDeviceGetComputeRunningProcesses_v3"
_MPS = "nvmlDeviceGetMPSComputeRunningProcesses_v3"

_ROOM_TO_GROW = 16  # processes that may start between two questions


class Unknown(Exception):
    """NVML does not say; the text says why."""


def survey(pids: set[int] | None, libcuda: str) -> Survey:
    """All GPUs of the node, and those of the processes `pids` that are on one, None for every.

    `libcuda` is the library in use, beside which NVML is looked for first. Raises Unknown."""
    found = Survey()
    with _opened(libcuda) as library:
        for device in _devices(library):
            found.devices.append(_device(library, device))
            for call in (_COMPUTE, _MPS):
                found.uses += _uses(library, call, device, found.devices[-1], pids)
    return found


def _device(library: Any, device: Any) -> Device:
    uuid: Any = ffi.new("char[]", _UUID_BYTES)
    _check(library, "nvmlDeviceGetUUID", device, uuid, _UUID_BYTES)
    memory: Any = ffi.new("device_memory *")
    _check(library, "nvmlDeviceGetMemoryInfo", device, memory)
    now, after_reset = ffi.new("unsigned int *"), ffi.new("unsigned int *")
    try:
        _check(library, "nvmlDeviceGetMigMode", device, now, after_reset)
    except (Unknown, AttributeError, ffi.error):
        pass  # a GPU, or an NVML, without MIG: it stays 0
    name: Any = ffi.string(uuid)
    return Device(name.decode(), memory.total, memory.free, bool(now[0]))


def _uses(library: Any, call: str, device: Any, on: Device, pids: set[int] | None) -> list[Use]:
    try:
        entries = _processes(library, call, device)
    except (Unknown, AttributeError, ffi.error):
        if call == _COMPUTE:
            raise
        return []  # an NVML that knows no MPS on this GPU
    return [
        Use(
            on.uuid,
            entry.pid,
            None if entry.used == _NOT_AVAILABLE else entry.used,
            mig=on.mig and entry.gpu_instance != _NO_INSTANCE,
            mps=call == _MPS,
        )
        for entry in entries
        if pids is None or entry.pid in pids
    ]


@contextmanager
def _opened(libcuda: str) -> Iterator[Any]:
    library = _load(libcuda)
    try:
        _check(library, "nvmlInit_v2")
        try:
            yield library
        finally:
            library.nvmlShutdown()
    except (AttributeError, ffi.error) as error:
        raise Unknown(f"{LIBRARY} is older than r510: {error}") from error


def _load(libcuda: str) -> Any:
    beside = os.path.join(os.path.dirname(libcuda), LIBRARY)
    for path in dict.fromkeys((beside, LIBRARY)):
        try:
            return ffi.dlopen(path)
        except OSError as error:
            why = error
    raise Unknown(f"NVML cannot be loaded: {why}")


def _devices(library: Any) -> Iterator[Any]:
    count = ffi.new("unsigned int *")
    _check(library, "nvmlDeviceGetCount_v2", count)
    for index in range(count[0]):
        device = ffi.new("void **")
        _check(library, "nvmlDeviceGetHandleByIndex_v2", index, device)
        yield device[0]


def _processes(library: Any, call: str, device: Any) -> Any:
    """One entry for each process on the GPU, or MIG instance of it."""
    count: Any = ffi.new("unsigned int *")
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
        raise Unknown(f"{call}: {text.decode()} ({code})")
    return code
