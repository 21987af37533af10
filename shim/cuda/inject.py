"""System calls made in the name of another process, by ptrace. For the helper process only.

The process is stopped at one of its threads for some tenths of a millisecond; its registers and
signal mask are put back before it goes on, and a system call it was in begins again as after any
stop. Whoever kills the helper in just that moment spoils the process: nobody else can.
x86-64 only.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from shim.cuda import ptrace
from shim.cuda._ptrace import ffi
from shim.cuda.ptrace import TraceError

_NO_CALL = 2**64 - 1  # orig_rax: the kernel is not to begin a call again
_SYSCALL = b"\x0f\x05"
_MAX_ERRNO = 4095


class Injected:
    """A thread that is stopped, and makes the calls it is told to."""

    def __init__(self, tid: int, gate: int, registers: Any) -> None:
        self._tid, self._gate, self._registers = tid, gate, registers
        self._number = 0

    def call(self, number: int, *arguments: int) -> int:
        """The call's result. Raises TraceError where it is an error."""
        self.begin(number, *arguments)
        return self.result()

    def begin(self, number: int, *arguments: int) -> None:
        """Lets the call go off: others can be begun in other threads meanwhile."""
        now: Any = ffi.new("user_registers *", self._registers[0])
        now.rax, now.orig_rax, now.rip = number, _NO_CALL, self._gate
        given = (*arguments, 0, 0, 0, 0, 0, 0)
        now.rdi, now.rsi, now.rdx, now.r10, now.r8, now.r9 = (a % 2**64 for a in given[:6])
        ptrace.set_registers(self._tid, now)
        self._number = number
        ptrace.step(self._tid)

    def result(self) -> int:
        """What the call that was begun has given. Raises TraceError where it is an error."""
        while ptrace.wait(self._tid, ptrace.STOP_SECONDS) != (signal.SIGTRAP << 8 | 0x7F):
            ptrace.step(self._tid)
        result: int = ptrace.registers(self._tid).rax
        if result >= 2**64 - _MAX_ERRNO:
            raise TraceError(f"system call {self._number}: {os.strerror(2**64 - result)}")
        return result

    def write(self, address: int, data: bytes) -> None:
        with open(f"/proc/{self._tid}/mem", "r+b", buffering=0) as memory:
            memory.seek(address)
            memory.write(data)


@contextmanager
def stopped(pid: int) -> Iterator[Injected]:
    """The process, stopped at its main thread as long as this lasts. Raises TraceError."""
    ptrace.seize(pid)
    try:
        ptrace.wait_for_stop(pid)
        with calling(pid) as injected:
            yield injected
    finally:
        ptrace.let_go(pid)


@contextmanager
def calling(tid: int) -> Iterator[Injected]:
    """A thread that was seized and has stopped, to make calls. Raises TraceError."""
    gate = _gate(tid)
    registers = ptrace.registers(tid)
    mask = ptrace.signal_mask(tid)
    ptrace.set_signal_mask(tid, ~(1 << (signal.SIGTRAP - 1)) % 2**64)  # all but our steps
    try:
        yield Injected(tid, gate, registers)
    finally:
        ptrace.set_registers(tid, registers)
        ptrace.set_signal_mask(tid, mask)


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
    raise TraceError("the process has no vDSO with a system call in it")
