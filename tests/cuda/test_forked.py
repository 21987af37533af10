"""What a forked child has of its parent's GPU is taken from it, and nothing else, and it does not
notice: real processes and real ptrace, with regular files in the devices' place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.cuda import discovery, forked
from shim.cuda.driver import Driver
from tests.cuda.waiting import until
from tests.simgpu.simgpu import Kit

# Opens and maps "devices", loads libcuda and forks; the child evaluates what is asked on stdin.
PROGRAM = """
import ctypes, mmap, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
ctypes.CDLL(sys.argv[1])
place = sys.argv[2]

def device(name):
    number = os.open(f"{place}/nvidia{name}", os.O_RDWR)
    return number, mmap.mmap(number, 8192)

(zero, memory), (control, _) = device("0"), device("ctl")
os.set_inheritable(control, True)
plain = os.open(f"{place}/plain", os.O_RDWR)
private = bytearray(b"mine" * 1000)
if os.fork():
    os.wait()
    os._exit(0)

handled = []
signal.signal(signal.SIGTRAP, lambda *_: handled.append("trap"))
signal.signal(signal.SIGUSR1, lambda *_: handled.append("usr1"))
if sys.argv[3:] == ["own"]:
    own, own_memory = device("-own")

def nap():
    "A call that the kernel takes up again by other means than it began; 0 when it was whole."
    print("napping", flush=True)
    return libc.clock_nanosleep(1, 0, (ctypes.c_long * 2)(1, 500_000_000), None)

print(os.getpid(), zero, control, plain, flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""
NANOSLEEP = "230"


class Family:
    def __init__(self, library: Path, place: Path, *words: str) -> None:
        for name in ("nvidia0", "nvidiactl", "nvidia-own", "plain"):
            (place / name).write_bytes(b"board" + bytes(8187))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(library), str(place), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.parent = self.process.pid
        self.child, self.zero, self.control, self.plain = map(int, self.line().split())

    def say(self, expression: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{expression}\n")
        self.process.stdin.flush()

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def ask(self, expression: str) -> str:
        """What the child says it is."""
        self.say(expression)
        return self.line()

    def inherited(self) -> forked.Inheritance:
        return forked.inherited(self.child, self.parent)

    def shed(self, driver: Driver) -> None:
        answer = driver.call("shed", self.child, timeout=30, argument=self.inherited().encode())
        assert answer.ok, answer.name

    def end(self) -> None:
        self.process.communicate()  # the child's stdin ends, then the child, then its parent
        assert self.process.returncode == 0


@pytest.fixture
def family(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Family]]:
    monkeypatch.setattr(discovery, "DEVICE_PREFIX", str(tmp_path / "nvidia"))
    made: list[Family] = []

    def make(*words: str) -> Family:
        made.append(Family(kit.libcuda, tmp_path, *words))
        return made[-1]

    yield make
    for one in made:
        one.end()


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def target(pid: int, number: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{number}")


def test_a_child_is_freed_of_what_it_inherited_and_goes_on(
    family: Callable[..., Family], driver: Driver
) -> None:
    one = family()
    found = one.inherited()
    assert len(found.mappings) == 2
    assert {(one.zero, True), (one.control, False)} < set(found.files)  # and mmap's own

    one.shed(driver)

    assert not one.inherited()
    assert discovery.DEVICE_PREFIX not in maps(one.child)
    assert not discovery.holds_devices(one.child)
    for number in (one.zero, one.control):
        assert target(one.child, number) == "/dev/null"
    assert one.ask("os.get_inheritable(zero), os.get_inheritable(control)") == "(False, True)"
    assert target(one.child, one.plain).endswith("/plain")
    assert one.ask("bytes(private) == b'mine' * 1000") == "True"
    assert one.ask("memory[:5] == bytes(5)") == "True"  # readable, and nothing of the board
    assert one.ask("handled") == "[]"


def test_its_parent_keeps_everything(family: Callable[..., Family], driver: Driver) -> None:
    one = family()
    before = maps(one.parent)
    one.shed(driver)
    assert maps(one.parent) == before
    assert target(one.parent, one.zero).endswith("/nvidia0")


def test_a_call_it_is_in_goes_on_as_if_nothing_was(
    family: Callable[..., Family], driver: Driver
) -> None:
    one = family()
    one.say("nap()")
    assert one.line() == "napping"
    until(lambda: Path(f"/proc/{one.child}/syscall").read_text().split()[0] == NANOSLEEP)
    one.shed(driver)
    assert one.line() == "0"


def test_its_signals_come_when_it_goes_on(family: Callable[..., Family], driver: Driver) -> None:
    one = family()
    one.shed(driver)
    assert one.ask("os.kill(os.getpid(), signal.SIGUSR1), handled") == "(None, ['usr1'])"
    assert one.ask("os.kill(os.getpid(), signal.SIGTRAP), handled") == "(None, ['usr1', 'trap'])"


def test_what_it_opened_itself_it_keeps(family: Callable[..., Family], driver: Driver) -> None:
    one = family("own")
    one.shed(driver)
    assert "nvidia-own" in maps(one.child)
    assert one.ask("own_memory[:5] == b'board'") == "True"


def test_a_program_of_its_own_has_inherited_nothing(family: Callable[..., Family]) -> None:
    """Another family has the same devices open, at other addresses."""
    one, other = family(), family()
    assert not forked.inherited(other.child, one.parent)


def test_a_process_that_is_traced_by_somebody_else_is_left_alone(
    family: Callable[..., Family], driver: Driver
) -> None:
    one = family()
    tracer = (
        "import ctypes, sys; libc = ctypes.CDLL(None); "
        f"assert libc.ptrace(0x4206, {one.child}, None, None) == 0; "
        "print(flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", tracer], stdin=pipe, stdout=pipe) as process:
        assert process.stdout
        process.stdout.readline()
        words = one.inherited().encode()
        answer = driver.call("shed", one.child, timeout=30, argument=words)
        assert not answer.ok
        assert "another tracer" in answer.name
        process.communicate()
    assert len(one.inherited().mappings) == 2
    assert one.ask("1 + 1") == "2"
