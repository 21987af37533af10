"""Memory for the driver's copy, made by all processors and in huge pages. For the helper process
only.

The driver maps memory in the process to copy into, and has the kernel make each page of it in that
one call: small pages, one processor, most of the time that a copy takes (H200, r580, 17 GB: 5.3 of
8.8 s). Nobody can ask for huge pages before that memory is there. So the thread that does the
driver's work is watched by ptrace: where it maps that much, the call is made without MAP_POPULATE,
huge pages are asked for in its name, and our threads touch each before it goes on. What was not
touched, for whatever reason, the kernel makes when the driver comes to it.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from shim import digests
from shim.cuda import ptrace
from shim.cuda._memory import ffi
from shim.cuda.inject import calling
from shim.cuda.ptrace import TraceError

_MMAP, _MADVISE, _ADVISE_HUGE = 9, 28, 14  # x86-64; asm-generic/mman-common.h
_POPULATE = 0x8000
_KIND = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _POPULATE
_HUGE = 2 << 20
_AT_A_TIME = 512  # pages that one call touches
_PIECE = 128 << 20


@contextmanager
def prefaulted(
    pid: int, tid: int, least: int, threads: int, enough: int = 0
) -> Iterator[list[str]]:
    """As long as this lasts, memory of `least` bytes or more that thread `tid` of a process maps
    and wants to have at once is made by `threads` of ours. Once that are `enough` bytes in all, if
    that is known, the thread is left alone: it stops at each of its calls while it is watched.

    Raises nothing: what is yielded has, afterwards, the reasons why that was not done."""
    failures: list[str] = []
    ready, over = threading.Event(), threading.Event()

    def watch() -> None:
        try:
            ptrace.seize(tid, tell_calls=True)
            due = 0
            try:
                status = ptrace.wait(tid, ptrace.STOP_SECONDS)
                ready.set()
                due = ptrace.signal_due(_followed(pid, tid, status, least, threads, enough, over))
            finally:
                ptrace.let_go(tid, due)
        except (TraceError, OSError) as error:
            failures.append(str(error))
        finally:
            ready.set()

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    ready.wait()
    try:
        yield failures
    finally:
        over.set()
        watching.join()


def _followed(
    pid: int,
    tid: int,
    status: int,
    least: int,
    threads: int,
    enough: int,
    over: threading.Event,
) -> int:
    """The wait status of its last stop."""
    length = made = 0
    while not over.is_set():
        ptrace.resume_to_call(tid, status)
        status = _next_stop(tid, over)
        call = ptrace.system_call(tid, status)
        if call is None:
            continue
        if call.begins:
            _, size, _, flags, *_ = call.arguments
            wanted = call.number == _MMAP and size >= least and flags & _KIND == _KIND
            length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE if wanted else 0
            if wanted:
                changed = ptrace.registers(tid)
                changed.r10 = flags & ~_POPULATE
                ptrace.set_registers(tid, changed)
        elif length and call.result > 0:
            _make(pid, tid, call.result, length, threads)
            made += length
            if enough and made >= enough:
                break
    return status


def _next_stop(tid: int, over: threading.Event) -> int:
    """Its wait status: soon one that we ask for, once all is over."""
    nap = 0.0
    while (status := ptrace.poll(tid)) is None:
        if over.is_set():
            ptrace.interrupt(tid)
            return ptrace.wait(tid, ptrace.STOP_SECONDS)
        time.sleep(nap)  # its calls come in bursts; in between it copies for seconds
        nap = min(nap + 0.00002, 0.005)
    return status


def _make(pid: int, tid: int, start: int, size: int, threads: int) -> None:
    before = _resident(pid)
    if _has_huge_pages(pid):
        with suppress(TraceError):  # a kernel without them
            _ask_for_huge_pages(tid, start, size)
        _touch(pid, start, size, _HUGE, threads)
    if _resident(pid) - before < size // 2:  # there are none, or not enough of them
        _touch(pid, start, size, mmap.PAGESIZE, threads)


def _ask_for_huge_pages(tid: int, start: int, size: int) -> None:
    try:
        with calling(tid) as caller:
            caller.call(_MADVISE, start, size, _ADVISE_HUGE)
    finally:
        ptrace.settle(tid)  # for as long as the touching takes


def _has_huge_pages(pid: int) -> bool:
    with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
        if "[never]" in file.read():
            return False
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return "THP_enabled:\t0" not in file.read()


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def _touch(pid: int, start: int, size: int, page: int, threads: int) -> None:
    """Writes a zero, which is there already, to each page: nobody but us knows of that memory."""
    libc: Any = ffi.dlopen(None)
    zero = ffi.new("char *")

    def touch(begin: int, end: int) -> None:
        places = [begin, *range(begin + page - begin % page, end, page)]
        for at in range(0, len(places), _AT_A_TIME):
            some = places[at : at + _AT_A_TIME]
            here = ffi.new("our_span[]", [(zero, 1)] * len(some))
            there = ffi.new("their_span[]", [(place, 1) for place in some])
            if libc.process_vm_writev(pid, here, len(some), there, len(some), 0) < len(some):
                return  # no memory, say: the driver is the one to be told

    begins = [start, *range(start + _PIECE - start % _PIECE, start + size, _PIECE)]
    ends = [*begins[1:], start + size]
    digests.in_threads([partial(touch, *ends) for ends in zip(begins, ends, strict=True)], threads)
