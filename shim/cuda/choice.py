"""Whether, and how, a lane's files are compressed. For the helper process only.

Compressing pays where the disk is what is waited for: it has less to take then. So before the first
file is written, some of the memory is compressed by as many threads as are to write, and written to
the disk as it is; from these figures follows which way takes the least time.
"""

from __future__ import annotations

import errno
import mmap
import os
import time

from shim import digests
from shim.cuda import codec, lane, packed
from shim.cuda._memory import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

NONE, AUTO = "", "auto"

_GAIN = 1.1
"""How many times as fast it must be: the node's processors have other work, too."""

_CHUNKS, _MOST_CHUNKS = 2, 64
"""Of the memory that a thread compresses, 10 to 20 ms by Zstandard; and all of them: it takes
memory."""
_TIMES = 2
"""The first time also makes the pages of the buffers."""
_LEAST, _MOST = 32 << 20, 256 << 20
"""Bytes that are written to the disk at a time, and in the end, to learn how fast it is, ..."""
_SECONDS = 0.2
"""... which it is known by what takes so long."""


class Disk:
    """A directory's: `speed` in bytes a second that the lane's threads write to it at, and `work`,
    seconds a byte that this keeps the processors busy."""

    __slots__ = ("speed", "work")

    def __init__(self, speed: float, work: float) -> None:
        self.speed, self.work = speed, work


class Trial:
    """What became of the sample: `speed` in bytes a second that it was compressed at by all
    threads, and how many times smaller it was then."""

    __slots__ = ("ratio", "speed")

    def __init__(self, speed: float, ratio: float) -> None:
        self.speed, self.ratio = speed, ratio


def rate(disk: Disk, trial: Trial) -> float:
    """Bytes of memory a second that get to the disk, if they are compressed like that. The
    processors compress and copy while the disk writes, and the slower of both is waited for; where
    the disk is memory, it is the processors."""
    processors = 1 / trial.speed + disk.work / trial.ratio
    return 1 / max(processors, 1 / (disk.speed * trial.ratio))


def best(disk: Disk, trials: dict[str, Trial]) -> tuple[str, str]:
    """The codec, NONE where that is best, and why."""
    rates = {name: rate(disk, trial) for name, trial in trials.items()}
    found = max(rates, key=lambda name: rates[name], default=NONE)
    if found and rates[found] < disk.speed * _GAIN:
        found = NONE
    tried = "".join(
        f", {name} {rates[name] / 1e9:.2f} ({trial.ratio:.2f} times smaller, "
        f"{trial.speed / 1e9:.2f} by itself)"
        for name, trial in trials.items()
    )
    return found, f"GB/s to this disk: as it is {disk.speed / 1e9:.2f}{tried}"


def choose(
    pid: int,
    *,
    wanted: str,
    ranges: list[tuple[int, int]],
    directory: str,
    threads: int,
    direct: bool,
) -> tuple[str, str]:
    """The codec to compress these ranges of a process's memory by on their way into a directory,
    NONE for none, and why. `wanted` is a codec, or AUTO for what is measured to be the best.

    Never fails what can be done without: where something cannot be measured or loaded, it is
    NONE. Raises LaneError where the process has ended."""
    if wanted != AUTO:
        reason = codec.why_not(wanted)
        return (NONE, reason) if reason else (wanted, "configured")
    missing = codec.missing()
    if len(missing) == len(codec.LIBRARIES):
        return NONE, "; ".join(missing.values())
    chunks = lane.sample(pid, ranges, min(_CHUNKS * threads, _MOST_CHUNKS))
    if not chunks:
        return NONE, "nothing but zeros was found"
    try:
        disk = measured(directory, chunks, threads, direct)
    except OSError as error:
        return NONE, f"the disk cannot be measured: {error.strerror}"
    trials = {name: trial(name, chunks, threads) for name in codec.LIBRARIES if name not in missing}
    found, why = best(disk, trials)
    return found, "; ".join([why, *missing.values()])


def trial(name: str, chunks: list[memoryview], threads: int) -> Trial:
    """By that codec. Raises codec.Unavailable."""
    buffers = [mmap.mmap(-1, packed.CHUNK) for _ in range(threads)]
    packings = [packed.Packing(name, _address(one), memoryview(one)) for one in buffers]

    stored = [0] * threads

    def one(number: int) -> None:
        add = packings[number].add
        part = chunks[number::threads]
        stored[number] = sum(len(add(_address(chunk), chunk, False)[0]) for chunk in part)

    jobs: list[Callable[[], None]] = [lambda n=n: one(n) for n in range(threads)]  # type: ignore[misc]
    seconds = min(_timed(jobs, threads) for _ in range(_TIMES))
    size = sum(map(len, chunks))
    return Trial(size / seconds, size / sum(stored))


def measured(directory: str, chunks: list[memoryview], threads: int, direct: bool) -> Disk:
    """The disk, by writing such chunks to files without names as the lane does, more until it
    takes a while. Raises OSError, and leaves nothing behind."""
    libc: Any = ffi.dlopen(None)
    files = [_unnamed(directory, number, direct) for number in range(threads)]
    processors = min(threads, len(os.sched_getaffinity(0)))
    try:
        count = max(_LEAST // threads // packed.CHUNK, 1)
        while True:

            def one(number: int, count: int = count) -> None:
                for turn in range(count):
                    chunk = chunks[(number * count + turn) % len(chunks)]
                    lane.store(libc, files[number], chunk, turn * packed.CHUNK, direct)
                os.fsync(files[number])

            before = time.process_time()
            seconds = _timed([lambda n=n: one(n) for n in range(threads)], threads)  # type: ignore[misc]
            work = (time.process_time() - before) / processors
            size = count * threads * packed.CHUNK
            if seconds >= _SECONDS or size >= _MOST:
                return Disk(size / seconds, work / size)
            count *= 2
    finally:
        for fd in files:
            os.close(fd)


def _unnamed(directory: str, number: int, direct: bool) -> int:
    path = os.path.join(directory, f"lane-probe-{number}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
    except OSError as error:
        if not direct or error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags & ~os.O_EXCL, 0o600)  # some create it before they refuse
    os.unlink(path)
    return fd


def _timed(jobs: list[Callable[[], None]], threads: int) -> float:
    began = time.monotonic()
    digests.in_threads(jobs, threads)
    return max(time.monotonic() - began, 1e-9)


def _address(memory: mmap.mmap | memoryview) -> int:
    return int(ffi.cast("uintptr_t", ffi.from_buffer(memory)))
