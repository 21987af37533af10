"""Discovery reads /proc alone and is never fooled by pids that are used again."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.cuda import discovery
from tests.cuda.freezer import Freezer
from tests.cuda.waiting import until

MIB = 1 << 20


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    until(lambda: discovery.identify(process.pid).comm == "sleep")
    yield process
    process.kill()
    process.wait()


def test_appeared_finds_new_ranges_largest_first_even_where_the_kernel_joined_them() -> None:
    before = [(0x1000, 0x2000), (0x8000, 0x9000)]
    after = [(0x1000, 0x4000), (0x7000, 0xA000), (0x20000, 0x21000)]
    assert discovery.appeared(before, after) == [
        (0x2000, 0x4000),
        (0x7000, 0x8000),
        (0x9000, 0xA000),
        (0x20000, 0x21000),
    ]


def test_appeared_says_nothing_of_ranges_that_went_or_stayed() -> None:
    assert discovery.appeared([(0x1000, 0x4000), (0x8000, 0x9000)], [(0x2000, 0x3000)]) == []


def test_anonymous_memory_shows_a_mapping_that_a_process_makes() -> None:
    program = (
        "import mmap, sys\n"
        "print(flush=True); sys.stdin.readline()\n"
        f"m = mmap.mmap(-1, {64 * MIB}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "print(flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        before = discovery.anonymous_memory(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        new = discovery.appeared(before, discovery.anonymous_memory(process.pid))
        process.stdin.write(b"\n")
    assert 64 * MIB <= new[0][1] - new[0][0] < 66 * MIB


def test_a_process_that_has_neither_the_library_nor_a_device_is_no_candidate(
    sleeper: subprocess.Popen[bytes],
) -> None:
    assert discovery.candidates([sleeper.pid]) == []


def test_a_process_that_maps_a_libcuda_is_a_candidate(tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.580.159"
    library.write_bytes(bytes(4096))
    program = (
        "import mmap, sys\n"
        f"f = open({str(library)!r}, 'rb')\n"
        "m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)\n"
        "print(flush=True); sys.stdin.readline()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        (found,) = discovery.candidates([process.pid])
        process.stdin.write(b"\n")
    assert (found.pid, found.devices) == (process.pid, False)


def test_a_process_that_holds_a_device_is_a_candidate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    device = tmp_path / "nvidia0"
    device.touch()
    monkeypatch.setattr(discovery, "DEVICE_PREFIX", str(tmp_path / "nvidia"))
    with device.open() as held:
        process = subprocess.Popen(["sleep", "600"], pass_fds=[held.fileno()])
    (found,) = discovery.candidates([process.pid])
    process.kill()
    process.wait()
    assert found.devices


def test_processes_that_vanish_are_not_there(sleeper: subprocess.Popen[bytes]) -> None:
    found = discovery.identify(sleeper.pid)
    sleeper.kill()
    until(lambda: not discovery.alive(found.pid, found.start_time))  # a zombie until waited for
    with pytest.raises(discovery.ProcessGone):
        discovery.identify(sleeper.pid)
    sleeper.wait()
    assert discovery.candidates([sleeper.pid]) == []


def test_another_process_under_the_same_pid_is_not_the_one(
    sleeper: subprocess.Popen[bytes],
) -> None:
    found = discovery.identify(sleeper.pid)
    assert discovery.alive(found.pid, found.start_time)
    assert not discovery.alive(found.pid, found.start_time - 1)


def test_inner_pids_name_every_nested_namespace_from_the_container_inwards() -> None:
    """unshare in unshare: a container, and a pid namespace within it."""
    program = "echo; read line"
    with subprocess.Popen(
        ["unshare", "-pf", "sh", "-c", f"true; unshare -pf sh -c '{program}'; true"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        chains = [discovery.identify(pid).inner for pid in descendants(process.pid)]
        process.stdin.write(b"\n")
    # the outer unshare (no namespace of its own), its sh, the inner unshare, its sh
    assert chains[0] == (1,)
    assert len(chains[-1]) == 2 and chains[-1][1] == 1


def test_a_stopped_process_cannot_answer(sleeper: subprocess.Popen[bytes]) -> None:
    assert discovery.standstill(sleeper.pid) == ""
    sleeper.send_signal(signal.SIGSTOP)
    until(lambda: "SIGSTOP" in discovery.standstill(sleeper.pid))
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: discovery.standstill(sleeper.pid) == "")


def test_a_process_in_a_frozen_cgroup_cannot_answer(
    sleeper: subprocess.Popen[bytes], freezer: Freezer
) -> None:
    freezer.add(sleeper.pid)
    assert discovery.standstill(sleeper.pid) == ""
    with freezer.frozen():
        assert "frozen by cgroup" in discovery.standstill(sleeper.pid)
    assert discovery.standstill(sleeper.pid) == ""


def descendants(pid: int) -> list[int]:
    children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [found for child in children for found in (child, *descendants(child))]
