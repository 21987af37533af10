"""Calls in the name of a frozen process: made, while nothing of the process itself runs."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.criu_bridge import freezer as freezers
from shim.cuda.inject import calling
from shim.cuda.ptrace import TraceError
from shim.cuda.still import held
from tests.cuda.freezer import Freezer
from tests.cuda.waiting import until

_MADVISE, _DONTNEED = 28, 4

# Two threads that never stop counting, and a page to drop.
PROGRAM = """
import mmap, sys, threading
file = open(sys.argv[1], "r+b")
counts = mmap.mmap(file.fileno(), 4096)
page = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
page.write(b"full" * (1 << 18))

def count(place):
    while True:
        counts[place] = (counts[place] + 1) % 256

for place in (0, 1):
    threading.Thread(target=count, args=(place,), daemon=True).start()
import ctypes
print(ctypes.addressof(ctypes.c_char.from_buffer(page)), flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, mmap.mmap]]:
    path = tmp_path / "counts"
    path.write_bytes(bytes(4096))
    with open(path, "r+b") as file:
        counts = mmap.mmap(file.fileno(), 4096)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    yield process, int(process.stdout.readline()), counts
    process.kill()
    process.wait()
    process.stdout.close()


def test_calls_are_made_and_nothing_else_runs(
    counting: tuple[subprocess.Popen[str], int, mmap.mmap], freezer: Freezer
) -> None:
    process, page, counts = counting
    freezer.add(process.pid)
    with freezer.frozen():
        before = counts[:2]
        with held(freezer.directory):
            for name in os.listdir(f"/proc/{process.pid}/task"):
                with calling(int(name)) as injected:
                    assert injected.call(39) == process.pid  # getpid
            with calling(process.pid) as injected:
                injected.call(_MADVISE, page, 1 << 20, _DONTNEED)
        assert freezers.state(freezer.directory) == freezers.FROZEN
        assert counts[:2] == before
        with open(f"/proc/{process.pid}/mem", "rb") as memory:
            memory.seek(page)
            assert not any(memory.read(1 << 20))
    for place in (0, 1):  # both count again
        now = counts[place]
        until(lambda now=now, place=place: counts[place] != now)  # type: ignore[misc]


def test_a_running_group_is_refused(
    counting: tuple[subprocess.Popen[str], int, mmap.mmap], freezer: Freezer
) -> None:
    freezer.add(counting[0].pid)
    with pytest.raises(TraceError, match="not frozen"), held(freezer.directory):
        pass


def test_it_is_frozen_again_after_an_error(
    counting: tuple[subprocess.Popen[str], int, mmap.mmap], freezer: Freezer
) -> None:
    process, _, counts = counting
    freezer.add(process.pid)
    with freezer.frozen():
        before = counts[:2]
        with (
            pytest.raises(TraceError, match=r"Bad address|Invalid argument"),
            held(freezer.directory),
            calling(process.pid) as injected,
        ):
            injected.call(_MADVISE, 1, 1 << 20, _DONTNEED)
        assert freezers.state(freezer.directory) == freezers.FROZEN
        assert counts[:2] == before
