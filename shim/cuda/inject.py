"""System calls made in the name of another process, by ptrace. For the helper process only.

The process is stopped at one of its threads for some tenths of a millisecond; its registers and
signal mask are put back before it goes on, and a system call it was in begins again as after any
stop. Whoever kills the helper in just that moment spoils the process: nobody else can.
x86-64 only.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shim.cuda._ptrace import ffi

# ptrace(2), by number: linux/ptrace.h
_SEIZE, _INTERRUPT, _DETACH, _SINGLESTEP = 0x4206, 0x4207, 17, 9
_GETREGSET, _SETREGSET, _GETSIGMASK, _SETSIGMASK = 0x4204, 0x4205, 0x420A, 0x420B
_PRSTATUS = 1
_WALL = 0x40000000
_NO_CALL = 2**64 - 1  # orig_rax: the kernel is not to begin a call again

_STOP_SECONDS = 5.0  # for a thread to stop: it may be in the middle of reading from a disk
_SYSCALL = b"\x0f\x05"
_MAX_ERRNO = 4095


class InjectionError(Exception):
    """The call could not be made, or failed; the process goes on as it was."""


class Injected:
    """A process that is stopped, and makes the calls it is told to."""

    def __init__(self, pid: int, gate: int, registers: Any, libc: Any) -> None:
        self._pid, self._gate, self._registers, self._libc = pid, gate, registers, libc
        self._number = 0

    def call(self, number: int, *arguments: int) -> int:
        """The call's result. Raises InjectionError where it is an error."""
        self.begin(number, *arguments)
        return self.result()

    def begin(self, number: int, *arguments: int) -> None:
        """Lets the call go off: others can be begun in other threads meanwhile."""
        now: Any = ffi.new("user_registers *", self._registers[0])
        now.rax, now.orig_rax, now.rip = number, _NO_CALL, self._gate
        given = (*arguments, 0, 0, 0, 0, 0, 0)
        now.rdi, now.rsi, now.rdx, now.r10, now.r8, now.r9 = (a % 2**64 for a in given[:6])
        _set_registers(self._libc, self._pid, now)
        self._number = number
        _ptrace(self._libc, _SINGLESTEP, self._pid)

    def result(self) -> int:
        """What the call that was begun has given. Raises InjectionError where it is an error."""
        while _wait(self._pid, _STOP_SECONDS) != (signal.SIGTRAP << 8 | 0x7F):
            _ptrace(self._libc, _SINGLESTEP, self._pid)
        result: int = _get_registers(self._libc, self._pid).rax
        if result >= 2**64 - _MAX_ERRNO:
            raise InjectionError(f"system call {self._number}: {os.strerror(2**64 - result)}")
        return result

    def write(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self._pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)


@contextmanager
def stopped(pid: int) -> Iterator[Injected]:
    """The process, stopped at its main thread as long as this lasts. Raises InjectionError."""
    seize(pid)
    try:
        wait_for_stop(pid)
        with calling(pid) as injected:
            yield injected
    finally:
        let_go(pid)


def seize(tid: int) -> None:
    """Has a thread stop, if it runs, and stay so until `let_go` or the end of the calling thread.
    Raises InjectionError."""
    if platform.machine() != "x86_64":
        raise InjectionError(f"not done on {platform.machine()}")
    libc: Any = ffi.dlopen(None)
    _ptrace(libc, _SEIZE, tid)
    _ptrace(libc, _INTERRUPT, tid)


def wait_for_stop(tid: int) -> int:
    """Returns the signal that `let_go` must give it, 0 for none: one on the way to the thread may
    stop it sooner than we do. Raises InjectionError."""
    status = _wait(tid, _STOP_SECONDS)
    return 0 if status >> 16 else os.WSTOPSIG(status)


@contextmanager
def calling(tid: int) -> Iterator[Injected]:
    """A thread that was seized and has stopped, to make calls. Raises InjectionError."""
    libc: Any = ffi.dlopen(None)
    gate = _gate(tid)
    registers = _get_registers(libc, tid)
    before = ffi.new("uint64_t *")
    all_but_steps = ffi.new("uint64_t *", ~(1 << (signal.SIGTRAP - 1)) % 2**64)
    _ptrace(libc, _GETSIGMASK, tid, 8, before)
    _ptrace(libc, _SETSIGMASK, tid, 8, all_but_steps)
    try:
        yield Injected(tid, gate, registers, libc)
    finally:
        _set_registers(libc, tid, registers)
        _ptrace(libc, _SETSIGMASK, tid, 8, before)


def let_go(tid: int, signal_due: int = 0) -> None:
    """The thread goes on as it was before `seize`."""
    libc: Any = ffi.dlopen(None)
    try:
        _ptrace(libc, _DETACH, tid, data=ffi.cast("void *", signal_due))
    except InjectionError:
        pass  # it has ended, or never stopped: then the end of the calling thread lets go of it


def _gate(pid: int) -> int:
    """The address of a system call instruction: the kernel's own page in each process has one."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
        span = next((line.split()[0] for line in file if line.rstrip().endswith("[vdso]")), "")
    if span:
        start, end = (int(part, 16) for part in span.split("-"))
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            at = memory.read(end - start).find(_SYSCALL)
        if at >= 0:
            return start + at
    raise InjectionError("the process has no vDSO with a system call in it")


def _get_registers(libc: Any, pid: int) -> Any:
    registers = ffi.new("user_registers *")
    vector: Any = ffi.new("io_vector *", {"base": registers, "size": ffi.sizeof("user_registers")})
    _ptrace(libc, _GETREGSET, pid, _PRSTATUS, vector)
    if vector.size != ffi.sizeof("user_registers"):
        raise InjectionError("it is no 64-bit process")
    return registers


def _set_registers(libc: Any, pid: int, registers: Any) -> None:
    vector = ffi.new("io_vector *", {"base": registers, "size": ffi.sizeof("user_registers")})
    _ptrace(libc, _SETREGSET, pid, _PRSTATUS, vector)


def _ptrace(libc: Any, request: int, pid: int, address: int = 0, data: Any = ffi.NULL) -> None:
    if libc.ptrace(request, pid, ffi.cast("void *", address), data) == -1:
        code = ffi.errno
        why = os.strerror(code)
        if code == errno.EPERM:
            why += " (another tracer, or the kernel's security settings)"
        raise InjectionError(f"ptrace: {why}")


def _wait(pid: int, seconds: float) -> int:
    """The wait status of its next stop. Raises InjectionError when it ends, or does not stop."""
    deadline = time.monotonic() + seconds
    nap = 0.0
    while True:
        try:
            found, status = os.waitpid(pid, os.WNOHANG | _WALL)
        except ChildProcessError as error:
            raise InjectionError("it has ended") from error
        if found and os.WIFSTOPPED(status):
            return status
        if found:
            raise InjectionError("it has ended")
        if time.monotonic() > deadline:
            raise InjectionError(f"it did not stop within {seconds:.0f} s")
        time.sleep(nap)  # the first look is usually too early by some microseconds
        nap = min(nap + 0.0001, 0.005)
