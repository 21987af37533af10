"""Digests of page images taken while CRIU still writes them.

CRIU dumps with one thread and only ever appends to `pages-N.img`, so a block that the file has
grown past is final. What is left to be digested when it has finished, with the container standing
still, are the last block of each and the small files.
"""

from __future__ import annotations

import os
import threading

from shim import digests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_LOOK_SECONDS = 0.02
_THREADS = 8


class Ahead:
    """Digests what is written to `directory`, from `with` on until `stop`.

    It must do no harm: what cannot be read is left to whoever reads all of it at the end.
    `algorithm` is one of `digests.new`.
    """

    def __init__(self, directory: str, algorithm: str) -> None:
        self._directory = directory
        self._algorithm = algorithm
        self._lock = threading.Lock()
        self._begun: dict[str, int] = {}
        """By file, how many blocks are digested or being so."""
        self._found: dict[tuple[str, int], bytes] = {}
        self._stopped = threading.Event()
        # One processor is CRIU's.
        count = min(max(len(os.sched_getaffinity(0)) - 1, 1), _THREADS)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Ahead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopped.set()  # no waiting: after a failure the disk may be what hangs

    def stop(self) -> dict[tuple[str, int], bytes]:
        """The digests by file name and number of the block, in any number of calls."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        return self._found

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                block = self._next()
                if block is None:
                    self._stopped.wait(_LOOK_SECONDS)
                    continue
                name, number = block
                path = os.path.join(self._directory, name)
                start = number * digests.BLOCK
                end = start + digests.BLOCK
                self._found[block] = digests.of_block(path, start, end, self._algorithm)
        except OSError:
            pass

    def _next(self) -> tuple[str, int] | None:
        """A block that is whole and nobody has begun."""
        with self._lock, os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith("pages-"):
                    number = self._begun.get(entry.name, 0)
                    if entry.stat(follow_symlinks=False).st_size > (number + 1) * digests.BLOCK:
                        self._begun[entry.name] = number + 1
                        return entry.name, number
        return None
