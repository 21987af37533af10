"""`python -m tests.bench.lane DIRECTORY`: what moving a process's memory to files and back costs,
beside writing and reading files of the same sizes with as many threads; with `--compressions` also
compressed, and what would be chosen there. Files are read from the disk, not from its cache, to be
filled in. Figures are for reading.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shim import digests
from shim.cuda import choice, lane
from shim.cuda.shards import Shard, cut
from tests.cuda.freezer import Freezer

_CHILD = """
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
if sys.argv[2] == "huge":
    memory.madvise(mmap.MADV_HUGEPAGE)
if sys.argv[3] == "random":
    piece = os.urandom(1 << 20)
else:  # a chunk, which is compressed by itself
    import array, random
    values = array.array("f", [random.gauss(0, 0.02) for _ in range(1 << 21)]).tobytes()
    piece = bytearray(1 << 22)
    piece[0::2], piece[1::2] = values[2::4], values[3::4]  # bfloat16
    if sys.argv[3] == "padded":
        for at in range(0, len(piece), 1 << 14):
            piece[at : at + (1 << 13)] = bytes(1 << 13)
    elif sys.argv[3] == "sparse":  # float32
        words = (random.gauss(0, 1e-4) if random.random() < 0.2 else 0 for _ in range(1 << 20))
        piece = array.array("f", words).tobytes()
for at in range(0, len(memory), len(piece)):
    memory[at : at + len(piece)] = piece
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""
_CHUNK = 4 << 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.lane", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--gib", type=float, default=2)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--direct", action="store_true")
    parser.add_argument("--pages", choices=["huge", "small"], default="huge", help="the process's")
    parser.add_argument(
        "--data", choices=["random", "weights", "padded", "sparse"], default="random"
    )
    parser.add_argument("--compressions", nargs="*", default=["off"], help="off, lz4, zstd")
    parser.add_argument("--algorithms", nargs="*", default=[digests.XXH3, digests.SHA256])
    options = parser.parse_args()
    size = int(options.gib * (1 << 30))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _CHILD, str(size), options.pages, options.data]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout
        start = int(child.stdout.readline())
        group = Freezer(f"grit-bench-{os.getpid()}")
        group.add(child.pid)
        for threads in options.threads:
            measure(options, group, child.pid, start, start + size, threads)
        child.communicate()
        group.remove()


def measure(
    options: argparse.Namespace, group: Freezer, pid: int, start: int, end: int, threads: int
) -> None:
    place: Path = options.directory
    shards = cut(start, end, "lane-", threads)
    said = f"{threads} threads, {len(shards)} files:"
    memory = own_memory(end - start, options.pages)
    for what, write_it in (("written", True), ("read", False)):
        timed(
            f"{said} memory of our own, {what}",
            end - start,
            lambda w=write_it: plain(place, memory, shards, threads, w),  # type: ignore[misc]
        )
    memory.close()
    clear(place)
    if options.compressions != ["off"]:
        began = time.monotonic()
        codec, why = choice.choose(
            pid,
            wanted="auto",
            ranges=[(start, end)],
            directory=str(place),
            threads=threads,
            direct=options.direct,
        )
        took = time.monotonic() - began
        print(f"{said} chosen: {codec or 'off'}, in {took:.2f} s: {why}", flush=True)
    for algorithm, codec in itertools.product(options.algorithms, options.compressions):

        def write(name: str = algorithm, codec: str = codec) -> list[Shard]:
            return lane.write(
                pid,
                start,
                end,
                str(place),
                "lane-",
                threads=threads,
                direct=options.direct,
                algorithm=name,
                compression="" if codec == "off" else codec,
            )

        def fill(made: list[Shard], name: str = algorithm) -> None:
            lane.fill(pid, start, str(place), made, threads=threads, fresh=True, algorithm=name)

        how = f"{algorithm}, {codec}"
        made = timed(f"{said} memory written, {how}", end - start, write)
        stored = sum((place / shard.name).stat().st_blocks * 512 for shard in made)
        print(f"{said} on the disk: {stored / (end - start):.0%}", flush=True)
        forget(place)
        timed(f"{said} memory filled, {how}", end - start, lambda m=made: fill(m))  # type: ignore[misc]
        with group.frozen():
            lane.drop(group.directory, [(pid, start, end)], threads=threads, seconds=60)
        timed(f"{said} dropped, then filled, {how}", end - start, lambda m=made: fill(m))  # type: ignore[misc]
        clear(place)


def forget(place: Path) -> None:
    """Has nothing of the files in the page cache."""
    for path in place.glob("lane-*"):
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def own_memory(size: int, pages: str) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if pages == "huge":
        memory.madvise(mmap.MADV_HUGEPAGE)
    piece = os.urandom(_CHUNK)
    for at in range(0, size, _CHUNK):
        memory[at : min(at + _CHUNK, size)] = piece[: size - at]
    return memory


def plain(place: Path, memory: mmap.mmap, shards: list[Shard], threads: int, write: bool) -> None:
    """Copies as much of our own memory to the same files, or back, and nothing else: no digests,
    no search for zeros, and for memory that there is already."""
    first = shards[0].start

    def one(shard: Shard) -> None:
        fd = os.open(place / shard.name, os.O_RDWR | os.O_CREAT, 0o600)
        with memoryview(memory) as view:
            for at in range(0, shard.size, _CHUNK):
                here = shard.start - first + at
                part = view[here : here + min(_CHUNK, shard.size - at)]
                if write:
                    os.pwrite(fd, part, at)
                else:
                    os.preadv(fd, [part], at)
                part.release()
        if write:
            os.fsync(fd)
        os.close(fd)

    digests.in_threads([lambda s=shard: one(s) for shard in shards], threads)  # type: ignore[misc]


def timed(what: str, size: int, action: Callable[[], Any]) -> Any:
    began = time.monotonic()
    result = action()
    print(f"{what:60} {size / 1e9 / (time.monotonic() - began):6.2f} GB/s", flush=True)
    return result


def clear(place: Path) -> None:
    for path in place.glob("lane-*"):
        path.unlink()


if __name__ == "__main__":
    main()
