"""A cgroup of the test's own that can freeze processes, on v2 or v1."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.cuda.waiting import until


def _mounted(kind: str, controller: str) -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.split()[0] == kind and controller in right.split()[2].split(","):
            return Path(left.split()[4])
    return None


class Freezer:
    """Made under the v2 hierarchy where it can freeze, else under v1's freezer."""

    def __init__(self, name: str) -> None:
        v2, v1 = _mounted("cgroup2", "rw"), _mounted("cgroup", "freezer")
        if v2:
            self._directory, self._switch = v2 / name, "cgroup.freeze"
            self._on, self._off, self._shown = "1", "0", "cgroup.events"
        else:
            assert v1, "no cgroup hierarchy that can freeze"
            self._directory, self._switch = v1 / name, "freezer.state"
            self._on, self._off, self._shown = "FROZEN", "THAWED", "freezer.state"
        self._directory.mkdir()

    @property
    def directory(self) -> str:
        return str(self._directory)

    def add(self, pid: int) -> None:
        (self._directory / "cgroup.procs").write_text(str(pid))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        (self._directory / self._switch).write_text(self._on)
        until(self._is_frozen)
        try:
            yield
        finally:
            (self._directory / self._switch).write_text(self._off)
            until(lambda: not self._is_frozen())

    def remove(self) -> None:
        """Its processes go back to the parent."""

        def gone() -> bool:
            with contextlib.suppress(OSError):
                for pid in (self._directory / "cgroup.procs").read_text().split():
                    (self._directory.parent / "cgroup.procs").write_text(pid)
                os.rmdir(self._directory)
            return not self._directory.exists()

        until(gone)

    def _is_frozen(self) -> bool:
        text = (self._directory / self._shown).read_text()
        return "frozen 1" in text or "FROZEN" in text
