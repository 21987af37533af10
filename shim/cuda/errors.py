"""What goes wrong on the CUDA side, as exceptions whose text can be shown to an operator as it is.

Every text names the pid and says in what state the process was left, as far as the driver said so.
"""

from __future__ import annotations


class CudaError(Exception):
    """A step on the GPU side failed. `states` maps each host pid concerned to the state it was
    left in: a word of `states`, "gone", or "unknown: <why>"."""

    def __init__(self, message: str, states: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.states = states or {}


class LibraryError(CudaError):
    """libcuda cannot be loaded, or lacks the checkpoint calls."""


class HelperDied(CudaError):
    """The helper process went away in the middle of a call; a next call starts a new one."""


class CallAbandoned(CudaError):
    """A driver call did not come back in time and is no longer waited for. The driver may still
    carry it out later."""


class LaneError(CudaError):
    """Memory could not be moved between a process and files."""
