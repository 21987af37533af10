"""Moves a range of another process's memory to files and back, many threads at a time. For the
helper process only.

What CRIU does with one thread and one file, by the system calls that need no ptrace: reading and
writing go on while the process is stopped, frozen or not. A file is one thread's from its first
byte to its last: threads that share a file wait for its inode. No thread holds the interpreter's
lock while it copies, compares, writes or digests.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from shim import digests, offsets
from shim.cuda import codec, packed
from shim.cuda._memory import ffi
from shim.cuda.errors import LaneError
from shim.cuda.inject import Injected, calling
from shim.cuda.ptrace import TraceError
from shim.cuda.shards import Shard, cut
from shim.cuda.still import held, living_threads

_CHUNK = packed.CHUNK  # bytes moved at a time: a huge page or more, and it fits into a cache
_HUGE = 2 << 20
_PAGE = mmap.PAGESIZE
_SYNC_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin to write to disk, do not wait

_MADVISE, _DONTNEED = 28, 4  # x86-64; asm-generic/mman-common.h
_DROP = 1 << 30  # bytes a call: a thread has 5 s for each, and 16 GB of small pages may need more
_LOOK = 1 << 20  # bytes of /proc/PID/pagemap at a time, 8 a page

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def write(
    pid: int,
    start: int,
    end: int,
    directory: str,
    prefix: str,
    *,
    threads: int,
    direct: bool,
    algorithm: str,
    compression: str = "",
) -> list[Shard]:
    """Writes memory [start, end) of a process to new files `<prefix><number>.img` in a directory,
    synced to disk with it; where 4 MiB in a row are zeros there is a hole. Nobody may write to that
    memory meanwhile. With `direct` past the page cache, where the file system lets it. `algorithm`
    is one of `digests.new`, `compression` one of `codec`'s; with that the files are `packed`.

    Raises LaneError or OSError, and then has removed the files. Whoever is killed meanwhile leaves
    them: they lie in a draft, and go with it."""
    shards = cut(start, end, prefix, threads, compression)
    libc = ffi.dlopen(None)
    made: list[str] = []
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _opened_pagemap(pid, start, end) as pagemap:

            def one(shard: Shard) -> None:
                try:
                    fd = os.open(shard.name, _NEW, 0o600, dir_fd=place)
                    made.append(shard.name)
                    try:
                        _write_shard(libc, pid, pagemap, shard, fd, direct, algorithm)
                    finally:
                        os.close(fd)
                except (OSError, codec.Unavailable) as error:
                    raise LaneError(
                        f"pid {pid}: cannot write {directory}/{shard.name}: {_reason(error)}"
                    ) from error

            digests.in_threads([lambda s=shard: one(s) for shard in shards], threads)  # type: ignore[misc]
        os.fsync(place)
    except BaseException:
        for name in made:
            try:
                os.unlink(name, dir_fd=place)
            except OSError:
                pass  # it goes with the draft
        raise
    finally:
        os.close(place)
    return shards


def _write_shard(
    libc: Any, pid: int, pagemap: int | None, shard: Shard, fd: int, direct: bool, algorithm: str
) -> None:
    """Notes both digests in it: the file's, and the memory's."""
    stream = digests.Stream(algorithm)
    quick = digests.fastest()
    same = quick == algorithm and not shard.codec
    seen = stream if same else digests.Stream(quick)
    if direct:
        direct = _bypass_cache(fd, True)
    packing = packed.Packing(shard.codec, *_buffer()) if shard.codec else None
    if packing is None:
        os.ftruncate(fd, shard.size)
    address, buffer = _buffer()
    for at, memory, absent in _chunks(libc, pid, pagemap, shard, address, buffer):
        if seen is not stream:
            seen.update(memory)
        empty = absent or _is_zero(libc, address, len(memory))
        chunk, to = (memory, at) if packing is None else packing.add(address, memory, empty)
        stream.update(chunk)
        if not empty:
            direct = store(libc, fd, chunk, to, direct)
    if packing is not None:
        chunk, to = packing.index()
        stream.update(chunk)
        store(libc, fd, chunk, to, direct)
    os.fsync(fd)
    shard.digest, shard.seen = stream.hexdigest(), seen.hexdigest()


def _chunks(
    libc: Any, pid: int, pagemap: int | None, shard: Shard, address: int, buffer: memoryview
) -> Iterator[tuple[int, memoryview, bool]]:
    """A shard's memory, as its offset, contents (in the buffer until the next one), and whether no
    page of it is there, as far as the pagemap tells."""
    for at in range(0, shard.size, _CHUNK):
        size = min(_CHUNK, shard.size - at)
        if pagemap is not None and _present(pagemap, shard.start + at, size) == 0:
            yield at, _ZEROS[:size], True
        else:
            _move(libc.process_vm_readv, pid, address, shard.start + at, size, "read")
            yield at, buffer[:size], False


def check(pid: int, shards: list[Shard], *, threads: int) -> None:
    """Looks whether the memory still is what was written of it. Raises LaneError where it is not,
    or is not there."""
    libc: Any = ffi.dlopen(None)

    def one(shard: Shard) -> None:
        stream = digests.Stream(digests.fastest())
        with _opened_pagemap(pid, shard.start, shard.start + shard.size) as pagemap:
            for _, chunk, _ in _chunks(libc, pid, pagemap, shard, *_buffer()):
                stream.update(chunk)
        if stream.hexdigest() != shard.seen:
            raise LaneError(
                f"pid {pid}: the memory at {shard.start:x} has changed since it was written to "
                f"{shard.name}"
            )

    digests.in_threads([lambda s=shard: one(s) for shard in shards], threads)  # type: ignore[misc]


def store(libc: Any, fd: int, data: memoryview, at: int, direct: bool) -> bool:
    """Writes to a file that is open past the cache, if `direct`; whether it still is then. Raises
    OSError."""
    try:
        offsets.write(fd, data, at)
    except OSError as error:
        if not (direct and error.errno == errno.EINVAL):
            raise
        direct = _bypass_cache(fd, False)  # it wants another alignment
        offsets.write(fd, data, at)
    if not direct:
        libc.sync_file_range(fd, at, len(data), _SYNC_WRITE)  # a hint: fsync is what counts
    return direct


def fill(
    pid: int,
    start: int,
    directory: str,
    shards: list[Shard],
    *,
    threads: int,
    fresh: bool,
    algorithm: str,
    held: bool = False,
) -> None:
    """Writes the files' contents into a process, the first one's to `start`, the others' as far
    behind it as they were. With `fresh` the memory there is known to be empty, so that zeros need
    not be written. With `held` the directory is somebody's /proc/PID/fd, whose names are links.

    Raises LaneError, also for a file whose contents are not those that were written: the memory
    is then not to be used, and can be filled again."""
    libc = ffi.dlopen(None)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if held else os.O_NOFOLLOW)

    def one(shard: Shard) -> None:
        path = os.path.join(directory, shard.name)
        try:
            fd = os.open(path, flags)
            try:
                to = start + shard.start - shards[0].start
                move = _fill_packed if shard.codec else _fill_shard
                digest = move(libc, pid, to, shard, fd, fresh, algorithm)
            finally:
                os.close(fd)
        except packed.Damaged as error:
            raise LaneError(f"pid {pid}: {path} is damaged: {error}") from error
        except (OSError, codec.Unavailable) as error:
            raise LaneError(f"pid {pid}: cannot read {path}: {_reason(error)}") from error
        if digest != shard.digest:
            raise LaneError(
                f"pid {pid}: {path} is damaged: its contents are not those that were written"
            )

    digests.in_threads([lambda s=shard: one(s) for shard in shards], threads)  # type: ignore[misc]


def _fill_shard(
    libc: Any, pid: int, to: int, shard: Shard, fd: int, fresh: bool, algorithm: str
) -> str:
    """The digest of what was written; "" for a file of another size or kind."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size != shard.size:
        return ""
    stream = digests.Stream(algorithm)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    address, buffer = _buffer()
    for at in range(0, shard.size, _CHUNK):
        size = min(_CHUNK, shard.size - at)
        if fresh and offsets.is_hole(fd, at, size):
            stream.update(_ZEROS[:size])
            continue
        chunk = buffer[:size]
        if offsets.read(fd, chunk, at) < size:
            return ""
        stream.update(chunk)
        if not (fresh and _is_zero(libc, address, size)):
            _move(libc.process_vm_writev, pid, address, to + at, size, "written to")
    return stream.hexdigest()


def _fill_packed(
    libc: Any, pid: int, to: int, shard: Shard, fd: int, fresh: bool, algorithm: str
) -> str:
    """The same of a compressed file. Raises packed.Damaged, codec.Unavailable.

    What is decompressed has not been seen to be the right thing yet: it can go nowhere but into a
    buffer of ours, and a process that it is put into does not run before all was."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return ""
    decompress = codec.decompressor(shard.codec)
    sizes, index = packed.read_index(shard.codec, fd, shard.size)
    stream = digests.Stream(algorithm)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    stored_address, stored = _buffer()
    address, buffer = _buffer()
    at = 0
    for number, (length, size) in enumerate(
        zip(sizes, packed.chunk_sizes(shard.size), strict=True)
    ):
        source = address
        if length:
            part = stored[: packed.padded(length)]
            if offsets.read(fd, part, at) < len(part):
                return ""
            stream.update(part)
            at += len(part)
            if length == size:
                source = stored_address
            elif decompress(stored_address, length, address, size) != size:
                raise packed.Damaged(f"chunk {number} cannot be decompressed")
        elif fresh:
            continue
        else:
            buffer[:size] = _ZEROS[:size]
        _move(libc.process_vm_writev, pid, source, to + number * _CHUNK, size, "written to")
    stream.update(index)
    return stream.hexdigest()


def sample(pid: int, ranges: list[tuple[int, int]], most: int) -> list[memoryview]:
    """Copies of up to so many chunks of a process's memory, from all over it, but for those of
    zeros. Raises LaneError."""
    libc: Any = ffi.dlopen(None)
    every = -(-sum(-(-(end - start) // _CHUNK) for start, end in ranges) // most)
    found: list[memoryview] = []
    for start, end in ranges:
        with _opened_pagemap(pid, start, end) as pagemap:
            for at in range(start, end, every * _CHUNK):
                size = min(_CHUNK, end - at)
                if pagemap is not None and _present(pagemap, at, size) == 0:
                    continue
                address, buffer = _buffer()
                _move(libc.process_vm_readv, pid, address, at, size, "read")
                if not _is_zero(libc, address, size):
                    found.append(buffer[:size])
    return found


def drop(group: str, ranges: list[tuple[int, int, int]], *, threads: int, seconds: float) -> None:
    """Gives memory of the frozen control group's processes back to the kernel, by calls that
    `threads` of each process's threads make; it reads as zeros then. `ranges` are (pid, start,
    end). Begins no further call once `seconds` are over.

    Raises LaneError, which says how much is still there, with the group frozen or saying that it
    is not."""
    deadline = time.monotonic() + seconds
    failure = ""
    with ExitStack() as stack:
        pagemaps = [stack.enter_context(_private_pagemap(*one)) for one in ranges]
        try:
            with held(group):
                for pid in {pid for pid, _, _ in ranges}:
                    mine = [(start, end) for p, start, end in ranges if p == pid]
                    _dropped_by(pid, mine, threads, deadline)
        except TraceError as error:
            failure = f": {error}"
        try:
            left = [
                (pid, start, end, count)
                for pagemap, (pid, start, end) in zip(pagemaps, ranges, strict=True)
                if (count := _present(pagemap, start, end - start))
            ]
        except OSError as error:
            raise LaneError(
                f"{group}: {error.strerror}: a process has ended, or is ending"
            ) from error
    if left or failure:
        kept = "; ".join(
            f"pid {pid}: {count} of {(end - start) // _PAGE} pages at {start:x} are still there"
            for pid, start, end, count in left
        )
        raise LaneError(f"{group}: memory was not dropped{failure}; {kept or 'all is'}")


def _dropped_by(pid: int, ranges: list[tuple[int, int]], threads: int, deadline: float) -> None:
    """Several threads at a time: half a second's work for one where there are only small pages."""
    total = sum(end - start for start, end in ranges)
    piece = max(min(-(-total // threads), _DROP) // _HUGE, 1) * _HUGE
    pieces = [
        (at, min(piece, end - at)) for start, end in ranges for at in range(start, end, piece)
    ]
    with ExitStack() as stack:
        callers = [stack.enter_context(calling(tid)) for tid in living_threads(pid)[:threads]]
        while pieces:
            if time.monotonic() > deadline:
                raise TraceError("it took too long")
            begun = []
            for caller in callers[: len(pieces)]:
                at, size = pieces.pop()
                caller.begin(_MADVISE, at, size, _DONTNEED)
                begun.append(caller)
            # All, before an error is raised: who is in the middle of a call must not be let go.
            failures = [failure for caller in begun if (failure := _failure_of(caller))]
            if failures:
                raise failures[0]


def _failure_of(caller: Injected) -> TraceError | None:
    try:
        caller.result()
    except TraceError as error:
        return error
    return None


@contextmanager
def _private_pagemap(pid: int, start: int, end: int) -> Iterator[int]:
    try:
        with _opened_pagemap(pid, start, end) as pagemap:
            if pagemap is None:
                raise LaneError(
                    f"pid {pid}: {start:x}-{end:x} is not private memory all through: that cannot "
                    "be dropped; nothing was"
                )
            yield pagemap
    except OSError as error:
        raise LaneError(f"pid {pid} has ended, or is ending: {error.strerror}") from error


def _reason(error: OSError | codec.Unavailable) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


_ZEROS = memoryview(bytes(_CHUNK))


def _buffer() -> tuple[int, memoryview]:
    """Memory of our own for a chunk, in huge pages where there are any, and its address."""
    memory = mmap.mmap(-1, _CHUNK + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        pass  # a kernel without them
    with ffi.from_buffer(memory) as pointer:
        address = int(ffi.cast("uintptr_t", pointer))
    skip = -address % _HUGE
    return address + skip, memoryview(memory)[skip : skip + _CHUNK]


def _move(call: Any, pid: int, ours: int, theirs: int, size: int, what: str) -> None:
    done = 0
    while done < size:
        here: Any = ffi.new("our_span *", (ffi.cast("void *", ours + done), size - done))
        there: Any = ffi.new("their_span *", (theirs + done, size - done))
        count = call(pid, here, 1, there, 1, 0)
        if count <= 0:
            code = ffi.errno
            why = os.strerror(code) if count else "nothing came"
            if code == errno.ESRCH:
                why += " (it has ended)"
            raise LaneError(f"pid {pid}: memory at {theirs + done:#x} cannot be {what}: {why}")
        done += count


def _is_zero(libc: Any, address: int, size: int) -> bool:
    """Whether the first word is zero, and each equals the one after it. The size is of pages."""
    word: Any = ffi.cast("uint64_t *", address)
    return not word[0] and not libc.memcmp(word, word + 1, size - 8)


def _bypass_cache(fd: int, on: bool) -> bool:
    """What it then is: a file system that cannot says so when it is asked."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return on


@contextmanager
def _opened_pagemap(pid: int, start: int, end: int) -> Iterator[int | None]:
    """The process's pagemap, if all of [start, end) is private memory without a file: only then is
    what has no page a zero. Raises LaneError where the process has ended."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            maps = file.read()
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LaneError(f"pid {pid} has ended: {error.strerror}") from error
    try:
        if not maps:
            raise LaneError(f"pid {pid} has ended")
        yield fd if _is_private(maps, start, end) else None
    finally:
        os.close(fd)


def _is_private(maps: str, start: int, end: int) -> bool:
    for line in maps.splitlines():
        span, allowed, _, _, inode, *_ = line.split()
        begins, ends = (int(part, 16) for part in span.split("-"))
        if begins <= start < ends:
            if allowed[3] != "p" or inode != "0":
                return False
            start = ends
            if start >= end:
                return True
    return False


def _present(pagemap: int, start: int, size: int) -> int:
    """How many of these pages are anywhere. The highest byte of an entry has the bits for a page in
    memory, in swap and in a file, and some marks (the kernel's admin-guide/mm/pagemap.rst)."""
    count, at, end = 0, start // _PAGE * 8, (start + size) // _PAGE * 8
    while at < end:
        entries = os.pread(pagemap, min(_LOOK, end - at), at)
        if not entries:
            raise LaneError("the process has ended")
        highest = entries[7::8]
        count += len(highest) - highest.count(0)
        at += len(entries)
    return count
