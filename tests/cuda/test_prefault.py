"""Memory that another process maps and wants at once is made by us, in huge pages."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shim.cuda import prefault, ptrace
from shim.cuda.prefault import prefaulted
from tests.cuda.waiting import until

MIB = 1 << 20
SIZE = 64 * MIB + 100  # the driver's is no number of pages, either

# A thread maps memory, fills it, and says where it is, each time it is told to.
PROGRAM = """
import ctypes, mmap, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long

def serve():
    print(threading.get_native_id(), flush=True)
    for line in sys.stdin:
        size, flags = map(int, line.split())
        address = libc.mmap(None, size, 3, 0x22 | flags, -1, 0)
        ctypes.memset(address, 7, 10)
        print(address, ctypes.string_at(address, 12).hex(), flush=True)

threading.Thread(target=serve).start()
"""
POPULATE = 0x8000


class Mapper:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout
        self.tid = int(self.process.stdout.readline())

    def map(self, size: int = SIZE, flags: int = POPULATE) -> dict[str, int]:
        """The numbers of /proc/PID/smaps for it, in KiB."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{size} {flags}\n")
        self.process.stdin.flush()
        address, contents = self.process.stdout.readline().split()
        assert contents == "07" * 10 + "0000"
        smaps = Path(f"/proc/{self.pid}/smaps").read_text()
        for part in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
            start, end = (int(edge, 16) for edge in part.split()[0].split("-"))
            if start <= int(address) < end:
                return {name: int(n) for name, n in re.findall(r"^(\w+): +(\d+) kB", part, re.M)}
        raise AssertionError(f"{address} is not mapped")


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    made = Mapper()
    yield made
    made.process.kill()
    made.process.communicate()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The sizes of the memory that we have made, and of the pages."""
    sizes: list[tuple[int, int]] = []
    touch = prefault._touch

    def noted(pid: int, start: int, size: int, page: int, threads: int) -> None:
        sizes.append((size, page))
        touch(pid, start, size, page, threads)

    monkeypatch.setattr(prefault, "_touch", noted)
    return sizes


def test_in_huge_pages(mapper: Mapper, made: list[tuple[int, int]]) -> None:
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        found = mapper.map()
        assert found["Rss"] == found["Size"]
        assert found["AnonHugePages"] >= 60 * 1024
        assert made == [(64 * MIB + 4096, 2 * MIB)]
        mapper.map()  # what is mapped in a second call, too
    assert failures == [] and len(made) == 2
    mapper.map()
    assert len(made) == 2
    assert traced_by(mapper.tid) == 0


def test_no_more_than_is_enough(mapper: Mapper, made: list[tuple[int, int]]) -> None:
    """Then the thread is watched no longer."""
    with prefaulted(mapper.pid, mapper.tid, MIB, 2, SIZE + MIB) as failures:
        mapper.map()
        assert traced_by(mapper.tid) != 0
        mapper.map()
        until(lambda: traced_by(mapper.tid) == 0)
        mapper.map()
    assert failures == [] and len(made) == 2


def test_without_huge_pages(
    mapper: Mapper, made: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefault, "_has_huge_pages", lambda pid: False)
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        found = mapper.map()
    assert (found["Rss"], found["AnonHugePages"], failures) == (found["Size"], 0, [])


@pytest.mark.parametrize(
    ("size", "flags"), [(SIZE, 0), (MIB // 2, POPULATE)], ids=["not-at-once", "small"]
)
def test_other_memory_is_left_alone(
    mapper: Mapper, made: list[tuple[int, int]], size: int, flags: int
) -> None:
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        mapper.map(size, flags)
    assert (made, failures) == ([], [])


def test_memory_that_we_cannot_make(mapper: Mapper, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process makes it itself, page by page."""

    def fail(*_: object) -> None:
        raise OSError("no thread")

    monkeypatch.setattr(prefault, "_touch", fail)
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        mapper.map()
    assert failures == ["no thread"]
    assert traced_by(mapper.tid) == 0


def test_who_is_traced_already(mapper: Mapper, made: list[tuple[int, int]]) -> None:
    ptrace.seize(mapper.tid)
    ptrace.wait_for_stop(mapper.tid)
    try:
        with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
            pass
    finally:
        ptrace.let_go(mapper.tid)
    assert failures == [
        "ptrace: Operation not permitted (another tracer, or the kernel's security settings)"
    ]
    mapper.map()


def test_who_has_ended(mapper: Mapper) -> None:
    """The reason is told as soon as it is known."""
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        mapper.process.kill()
        until(lambda: failures != [])


def test_signals_get_there(mapper: Mapper) -> None:
    """To a thread that is watched, and one that stops it keeps it so."""
    with prefaulted(mapper.pid, mapper.tid, MIB, 2) as failures:
        os.kill(mapper.pid, signal.SIGSTOP)
        until(lambda: state(mapper.tid) in "Tt")
        os.kill(mapper.pid, signal.SIGCONT)
        mapper.map()
        ctypes.CDLL(None).syscall(234, mapper.pid, mapper.tid, signal.SIGTERM)  # tgkill
        assert mapper.process.wait(30) == -signal.SIGTERM
    assert len(failures) == 1


def test_whoever_watches_is_killed(mapper: Mapper) -> None:
    """The process goes on by itself: the kernel lets go of it."""
    watcher = os.fork()
    if not watcher:
        with prefaulted(mapper.pid, mapper.tid, MIB, 2):
            signal.pause()
    try:
        until(lambda: traced_by(mapper.tid) != 0)
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
    assert mapper.map()["Rss"]


@pytest.mark.parametrize("huge", [True, False], ids=["huge pages", "small pages"])
def test_whoever_makes_the_memory_is_killed(
    mapper: Mapper, monkeypatch: pytest.MonkeyPatch, huge: bool
) -> None:
    """That takes the better part of a second for what a GPU has. The thread goes on by itself."""
    told, tell = os.pipe()

    def hang(*_: object) -> None:
        os.write(tell, b"!")
        signal.pause()

    monkeypatch.setattr(prefault, "_touch", hang)
    monkeypatch.setattr(prefault, "_has_huge_pages", lambda pid: huge)
    watcher = os.fork()
    if not watcher:
        with prefaulted(mapper.pid, mapper.tid, MIB, 2):
            os.write(tell, b"?")
            signal.pause()
    try:
        os.read(told, 1)
        with ThreadPoolExecutor(1) as pool:
            mapped = pool.submit(mapper.map)
            os.read(told, 1)
            os.kill(watcher, signal.SIGKILL)
            assert mapped.result(30)["Rss"]
    finally:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
        os.close(told)
        os.close(tell)
    assert mapper.process.poll() is None


def traced_by(tid: int) -> int:
    (tracer,) = re.findall(r"^TracerPid:\t(\d+)", Path(f"/proc/{tid}/status").read_text(), re.M)
    return int(tracer)


def state(tid: int) -> str:
    return Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()[0]
