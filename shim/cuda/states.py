"""Words and numbers of the driver's checkpoint calls, shared by all that speak of them.

Source of the numbers: CUDA driver API, `CUprocessState` and `CUresult` (cuda.h 12.8 and 13.0).
This module never imports anything.
"""

RUNNING = "running"
LOCKED = "locked"
CHECKPOINTED = "checkpointed"
FAILED = "failed"

WORDS = (RUNNING, LOCKED, CHECKPOINTED, FAILED)  # index: CUprocessState

SUCCESS = 0
NOT_INITIALIZED = 3  # also the answer about a process that has no CUDA
NOT_READY = 600  # a lock that was not granted within its timeout
NOT_SUPPORTED = 801
UNKNOWN = 999

DEVICE_MAP_CUDA = 13000
"""The first CUDA version whose restore takes GPU pairs (r580)."""

ERROR_NAMES = {
    SUCCESS: "CUDA_SUCCESS",
    1: "CUDA_ERROR_INVALID_VALUE",
    2: "CUDA_ERROR_OUT_OF_MEMORY",
    NOT_INITIALIZED: "CUDA_ERROR_NOT_INITIALIZED",
    100: "CUDA_ERROR_NO_DEVICE",
    304: "CUDA_ERROR_OPERATING_SYSTEM",
    401: "CUDA_ERROR_ILLEGAL_STATE",
    NOT_READY: "CUDA_ERROR_NOT_READY",
    NOT_SUPPORTED: "CUDA_ERROR_NOT_SUPPORTED",
    UNKNOWN: "CUDA_ERROR_UNKNOWN",
}


def word(state: int) -> str:
    """The word for a CUprocessState number, as `cuda-checkpoint --get-state` prints it."""
    return WORDS[state] if 0 <= state < len(WORDS) else f"state {state}"


def error_name(code: int) -> str:
    """The name of a CUresult, for where libcuda cannot be asked for it."""
    return ERROR_NAMES.get(code, f"CUDA error {code}")
