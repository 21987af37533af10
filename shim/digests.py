"""Digests of files, taken by all processors at once.

A dump's device memory lies in one file of many GB, and the container stands still while its digest
is taken: one SHA-256 over all of it runs at 1 GB/s, however many processors there are. So a file
larger than BLOCK is digested block by block, and its digest is that of its blocks' digests.

XXH3 (of 128 bits) takes a twentieth of the time, and finds damage as surely; who means harm can
make other contents for it. SHA-256 is for that, and for those that have no `xxhash`.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import ModuleType
    from typing import Protocol

    from shim.config import GritOptions

    class Hash(Protocol):
        def update(self, data: bytes | memoryview, /) -> None: ...
        def digest(self) -> bytes: ...


SHA256, XXH3 = "sha256", "xxh3"

BLOCK = 64 << 20
"""Bytes. Part of the format of `grit.json`: another value is another digest."""

_READ = 1 << 20
_THREADS = 16
"""More did not help on 16 processors, and each holds a buffer, in the lane of 4 MiB."""


class Unavailable(Exception):
    """There is no `xxhash` to take or check digests with; says what to do."""


def algorithm(settings: GritOptions) -> str:
    """By what a new checkpoint's files are digested. The one place that decides: what is signed
    must have digests that nobody can find another file for."""
    if settings.checksum == XXH3 and not settings.sign_key:
        try:
            _xxhash()
            return XXH3
        except Unavailable as error:
            from shim import log

            log.warning("checksums are SHA-256, which takes longer", error=error)
    return SHA256


def fastest() -> str:
    """The algorithm for what is compared soon, and kept nowhere."""
    try:
        _xxhash()
        return XXH3
    except Unavailable:
        return SHA256


def take(
    paths: dict[str, tuple[str, int]],
    *,
    algorithm: str = SHA256,
    plain: bool = False,
    also: Iterable[Callable[[], None]] = (),
    known: Mapping[tuple[str, int], bytes] | None = None,
) -> dict[str, str | OSError]:
    """The digests, in hex, of files by name, each given as its path and size in bytes; or why a
    file could not be read. `also` are other jobs to be done meanwhile; what they raise is raised.
    `known` are the digests of blocks, by file and number, that need not be taken again.

    A digest of the contents up to BLOCK bytes, above that one of the blocks' digests (32 bytes each
    of SHA-256, 16 of XXH3); with `plain` the first for all. Raises Unavailable.
    """
    new(algorithm)
    blocks: dict[str, list[bytes]] = {}
    failures: dict[str, OSError] = {}
    jobs: list[Callable[[], None]] = []

    def digest(name: str, number: int) -> None:
        path, size = paths[name]
        try:
            start = number * BLOCK
            end = size if plain else min(start + BLOCK, size)
            done = known.get((name, number)) if known and not plain else None
            blocks[name][number] = done or of_block(path, start, end, algorithm)
        except OSError as error:
            failures[name] = error

    for name, (_, size) in paths.items():
        blocks[name] = [b""] * (1 if plain else max(-(-size // BLOCK), 1))
        jobs += [lambda n=name, i=i: digest(n, i) for i in range(len(blocks[name]))]  # type: ignore[misc]
    in_threads([*also, *jobs])
    return {name: failures.get(name) or _whole(parts, algorithm) for name, parts in blocks.items()}


def processors() -> int:
    """How many are ours, but not more than help."""
    return min(len(os.sched_getaffinity(0)), _THREADS)


def in_threads(jobs: list[Callable[[], None]], threads: int = 0) -> None:
    """Does all jobs, in this order, `threads` at a time, or as many as there are processors; raises
    what the first failure raised, and then leaves out what was not begun.

    (concurrent.futures would do, and import `logging` into the daemon.)
    """
    import threading

    failures: list[BaseException] = []
    waiting = jobs[::-1]

    def run() -> None:
        while not failures:
            try:
                job = waiting.pop()  # one step under the interpreter's lock
            except IndexError:
                return
            try:
                job()
            except BaseException as error:
                failures.append(error)

    workers = min(len(jobs), threads or processors())
    running = [threading.Thread(target=run, daemon=True) for _ in range(workers)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise failures[0]


def new(algorithm: str) -> Hash:
    """A digest to be fed, by the name of its algorithm: sha256, or xxh3 (XXH3's 128 bits). Both
    let other threads run while they compute. Raises Unavailable."""
    if algorithm == XXH3:
        digest: Hash = _xxhash().xxh3_128()
        return digest
    import hashlib

    return hashlib.sha256()


def _xxhash() -> ModuleType:
    """From the program's own packages or, where the system's package is what brings it (Debian),
    from the system's, which the shim's start leaves out."""
    import sys

    try:
        import xxhash
    except ImportError:
        import site

        more = site.getsitepackages()
        sys.path += more
        try:
            import xxhash
        except ImportError:
            raise Unavailable(
                "this Python has no xxhash: install it (Debian and Ubuntu: python3-xxhash)"
            ) from None
        finally:
            del sys.path[-len(more) :]
    return xxhash


class Stream:
    """The digest of a file, as `take` has it, from its contents as they come."""

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._block, self._room = new(algorithm), BLOCK
        self._done: list[bytes] = []

    def update(self, data: memoryview) -> None:
        while len(data):
            if not self._room:
                self._done.append(self._block.digest())
                self._block, self._room = new(self._algorithm), BLOCK
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)

    def hexdigest(self) -> str:
        return _whole([*self._done, self._block.digest()], self._algorithm)


def _whole(parts: list[bytes], algorithm: str) -> str:
    if len(parts) == 1:
        return parts[0].hex()
    whole = new(algorithm)
    whole.update(b"".join(parts))
    return whole.digest().hex()


def of_block(path: str, start: int, end: int, algorithm: str) -> bytes:
    """The digest of a file's bytes from `start` to `end`. Raises OSError, Unavailable."""
    digest = new(algorithm)
    buffer = memoryview(bytearray(min(_READ, max(end - start, 1))))
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        while start < end:
            count = os.preadv(fd, [buffer[: end - start]], start)
            if not count:
                break  # shorter than was said: another digest
            digest.update(buffer[:count])
            start += count
    finally:
        os.close(fd)
    return digest.digest()
