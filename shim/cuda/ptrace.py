"""A thread of another process, stopped and looked into by ptrace(2). For the helper process only.

What traces is a thread, not a process: all of this about one thread is to be done in one of ours,
and at its end the kernel lets go of what it traced.
x86-64 only.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import struct
import time
from typing import Any

from shim.cuda._ptrace import ffi

# By number: linux/ptrace.h
_SEIZE, _INTERRUPT, _LISTEN, _DETACH = 0x4206, 0x4207, 0x4208, 17
_CONT, _SYSCALL, _SINGLESTEP, _GET_SYSCALL_INFO = 7, 24, 9, 0x420E
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_TRACE_SYSCALL_GOOD = 1
_EVENT_STOP = 128
_PRSTATUS = 1
_WALL = 0x40000000
_CALL_STOP = signal.SIGTRAP | 0x80
_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

STOP_SECONDS = 5.0  # for a thread to stop: it may be in the middle of reading from a disk


class TraceError(Exception):
    """It cannot be traced, or a call in its name was not made or failed; it goes on as it was."""


class SystemCall:
    """That a thread is about to make (`begins`), with its `number` and six `arguments`, or has
    made, with its `result`."""

    __slots__ = ("arguments", "begins", "number", "result")

    def __init__(self, begins: bool, number: int, arguments: tuple[int, ...], result: int) -> None:
        self.begins = begins
        self.number = number
        self.arguments = arguments
        self.result = result


def seize(tid: int, *, tell_calls: bool = False) -> None:
    """Has a thread stop, if it runs, and stay so until it is resumed or let go, or our thread ends.
    With `tell_calls` it can be resumed to its system calls. Raises TraceError."""
    if platform.machine() != "x86_64":
        raise TraceError(f"not done on {platform.machine()}")
    _ptrace(_SEIZE, tid, data=ffi.cast("void *", _TRACE_SYSCALL_GOOD if tell_calls else 0))
    interrupt(tid)


def interrupt(tid: int) -> None:
    """Has a thread that was seized stop. Raises TraceError."""
    _ptrace(_INTERRUPT, tid)


def wait_for_stop(tid: int) -> int:
    """Returns the signal that `let_go` must give it, 0 for none: one on the way to the thread may
    stop it sooner than we do. Raises TraceError."""
    return signal_due(wait(tid, STOP_SECONDS))


def signal_due(status: int) -> int:
    """The signal on its way to the thread whose stop has this wait status; 0 for none."""
    by = os.WSTOPSIG(status)
    return 0 if status >> 16 or by == _CALL_STOP else by


def let_go(tid: int, signal_due: int = 0) -> None:
    """The thread goes on as it was before `seize`."""
    try:
        _ptrace(_DETACH, tid, data=ffi.cast("void *", signal_due))
    except TraceError:
        pass  # it has ended, or never stopped: then the end of the calling thread lets go of it


def resume_to_call(tid: int, status: int) -> None:
    """Lets a stopped thread go on to the beginning or the end of its next system call, or to
    whatever stops it sooner. `status` is that of the stop: a signal on its way to the thread gets
    there, and one that the container itself has stopped stays so. Raises TraceError."""
    if status >> 16 == _EVENT_STOP and os.WSTOPSIG(status) in _STOP_SIGNALS:
        _ptrace(_LISTEN, tid)
    else:
        _ptrace(_SYSCALL, tid, data=ffi.cast("void *", signal_due(status)))


def system_call(tid: int, status: int) -> SystemCall | None:
    """The call at whose beginning or end the thread stands; None if something else stopped it.
    Raises TraceError."""
    if os.WSTOPSIG(status) != _CALL_STOP:
        return None
    info: Any = ffi.new("uint64_t[11]")
    _ptrace(_GET_SYSCALL_INFO, tid, ffi.sizeof(info), info)
    kind = info[0] & 0xFF  # struct ptrace_syscall_info: 1 entry, 2 exit
    if kind not in (1, 2):
        return None
    (result,) = struct.unpack("q", struct.pack("Q", info[3]))
    return SystemCall(kind == 1, info[3], tuple(info[4:10]), result)


def step(tid: int) -> None:
    """Lets a stopped thread do one instruction. Raises TraceError."""
    _ptrace(_SINGLESTEP, tid)


def settle(tid: int) -> None:
    """Moves a thread on from the stop after a step, where the signal that made it stop is still to
    be handed to it: the kernel would do so, and end the process, were our thread to end. Where it
    stands then, the thread would just go on. Raises TraceError."""
    interrupt(tid)
    status = 0
    while status >> 16 != _EVENT_STOP:
        _ptrace(_CONT, tid, data=ffi.cast("void *", signal_due(status)))
        status = wait(tid, STOP_SECONDS)


def wait(tid: int, seconds: float) -> int:
    """The wait status of its next stop. Raises TraceError when it ends, or does not stop."""
    deadline = time.monotonic() + seconds
    nap = 0.0
    while (status := poll(tid)) is None:
        if time.monotonic() > deadline:
            raise TraceError(f"it did not stop within {seconds:.0f} s")
        time.sleep(nap)  # the first look is usually too early by some microseconds
        nap = min(nap + 0.0001, 0.005)
    return status


def poll(tid: int) -> int | None:
    """The wait status of its stop, None if it has not stopped. Raises TraceError if it has
    ended."""
    try:
        found, status = os.waitpid(tid, os.WNOHANG | _WALL)
    except ChildProcessError as error:
        raise TraceError("it has ended") from error
    if found and not os.WIFSTOPPED(status):
        raise TraceError("it has ended")
    return status if found else None


def signal_mask(tid: int) -> int:
    """Of a stopped thread, a bit each. Raises TraceError."""
    mask: Any = ffi.new("uint64_t *")
    _ptrace(_GETSIGMASK, tid, 8, mask)
    return int(mask[0])


def set_signal_mask(tid: int, mask: int) -> None:
    """Raises TraceError."""
    _ptrace(_SETSIGMASK, tid, 8, ffi.new("uint64_t *", mask))


def registers(tid: int) -> Any:
    """Of a stopped thread, a `user_registers *`. Raises TraceError."""
    found = ffi.new("user_registers *")
    vector: Any = ffi.new("io_vector *", {"base": found, "size": ffi.sizeof("user_registers")})
    _ptrace(_GETREGSET, tid, _PRSTATUS, vector)
    if vector.size != ffi.sizeof("user_registers"):
        raise TraceError("it is no 64-bit process")
    return found


def set_registers(tid: int, new: Any) -> None:
    """Raises TraceError."""
    vector = ffi.new("io_vector *", {"base": new, "size": ffi.sizeof("user_registers")})
    _ptrace(_SETREGSET, tid, _PRSTATUS, vector)


def _ptrace(request: int, tid: int, address: int = 0, data: Any = ffi.NULL) -> None:
    libc: Any = ffi.dlopen(None)
    if libc.ptrace(request, tid, ffi.cast("void *", address), data) == -1:
        code = ffi.errno
        why = os.strerror(code)
        if code == errno.EPERM:
            why += " (another tracer, or the kernel's security settings)"
        raise TraceError(f"ptrace: {why}")
