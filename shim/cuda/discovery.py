"""Which of a container's processes may have CUDA, from /proc alone.

Never asks the driver, so it may be called about frozen processes. A process is known by its pid
and start time together: pids are used again. Processes that vanish while they are looked at are
simply not there.
"""

from __future__ import annotations

import os

DEVICE_PREFIX = "/dev/nvidia"  # nvidia0, nvidiactl, nvidia-uvm, nvidia-caps/...
_LIBRARY = b"/libcuda.so"
_EXITING = "exiting"
_PF_EXITING = 0x4  # linux/sched.h; in the flags field of stat
_V2_FROZEN = ("frozen 1",)
_V1_FROZEN = ("FREEZING", "FROZEN")


class Candidate:
    """A live process that may have CUDA.

    `pid` as the caller sees it; `start_time` in clock ticks since boot (proc(5): stat, 22);
    `inner` its pids from the container's pid namespace inwards, outermost first: the same again
    after a restore; `comm` its name; `devices` whether it holds an NVIDIA device open."""

    __slots__ = ("comm", "devices", "inner", "pid", "start_time")

    def __init__(
        self, pid: int, start_time: int, inner: tuple[int, ...], comm: str, devices: bool
    ) -> None:
        self.pid = pid
        self.start_time = start_time
        self.inner = inner
        self.comm = comm
        self.devices = devices

    @property
    def key(self) -> tuple[int, int]:
        return self.pid, self.start_time


def candidates(pids: list[int]) -> list[Candidate]:
    """Those of `pids` that have libcuda mapped or an NVIDIA device open."""
    found = []
    for pid in pids:
        try:
            devices = holds_devices(pid)
            if devices or _maps_libcuda(pid):
                found.append(identify(pid, devices))
        except (OSError, ProcessGone):
            continue
    return found


class ProcessGone(Exception):
    """The process has exited, or is about to (a zombie has no memory and no GPU any more)."""


def identify(pid: int, devices: bool = False) -> Candidate:
    """What /proc says of a process. Raises ProcessGone or OSError where it is not there."""
    state, start_time, comm = _stat(pid)
    if state == _EXITING:
        raise ProcessGone(pid)
    return Candidate(pid, start_time, _inner_pids(pid), comm, devices)


def alive(pid: int, start_time: int) -> bool:
    """Whether this very process still runs; False too where its pid is another's by now."""
    try:
        state, now_started, _ = _stat(pid)
    except OSError:
        return False
    return now_started == start_time and state != _EXITING


def holds_devices(pid: int) -> bool:
    """Whether the process has an NVIDIA device open. Raises OSError where it is gone."""
    directory = f"/proc/{pid}/fd"
    for fd in os.listdir(directory):
        try:
            if os.readlink(f"{directory}/{fd}").startswith(DEVICE_PREFIX):
                return True
        except OSError:
            continue  # closed meanwhile
    return False


def standstill(pid: int) -> str:
    """Why the process cannot answer the driver now ("frozen by cgroup /x"), or "".

    A tracing stop does not count: CRIU lets the driver's thread run in one, strace passes through
    them all the time."""
    try:
        if _stat(pid)[0] == "T":
            return "stopped by a signal (SIGSTOP)"
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            cgroups = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        return ""
    for _, controllers, path in cgroups:
        if controllers == "":
            frozen = any(_says_frozen(f"{d}/cgroup.events", _V2_FROZEN) for d in _v2(path))
        elif "freezer" in controllers.split(","):
            frozen = any(_says_frozen(f"{d}/freezer.state", _V1_FROZEN) for d in _v1_freezer(path))
        else:
            continue
        if frozen:
            return f"frozen by cgroup {path}"
    return ""


def anonymous_memory(pid: int) -> list[tuple[int, int]]:
    """The private anonymous rw-p ranges [start, end) of a process, in ascending order."""
    ranges = []
    with open(f"/proc/{pid}/maps", "rb") as file:
        for line in file:
            fields = line.split(None, 5)
            name = fields[5] if len(fields) > 5 else b""
            if fields[1] == b"rw-p" and fields[4] == b"0" and (not name or name[:6] == b"[anon:"):
                start, _, end = fields[0].partition(b"-")
                ranges.append((int(start, 16), int(end, 16)))
    return ranges


def appeared(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges in `after` that `before` does not cover, the largest first. The kernel joins
    neighbours, so a new range may be a part of one in `after`."""
    new = []
    for start, end in after:
        rest = start
        for old_start, old_end in before:
            if old_end <= rest or old_start >= end:
                continue
            if old_start > rest:
                new.append((rest, old_start))
            rest = min(old_end, end)
        if rest < end:
            new.append((rest, end))
    return sorted(new, key=lambda r: r[0] - r[1])


def _stat(pid: int) -> tuple[str, int, str]:
    """(state, start time, comm). State: as in proc(5), or _EXITING from the moment that the
    memory of a dying process may be gone."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        head, _, tail = file.read().rpartition(")")  # comm may hold spaces and parentheses
    fields = tail.split()
    exiting = fields[0] in "ZX" or int(fields[6]) & _PF_EXITING
    return _EXITING if exiting else fields[0], int(fields[19]), head.partition("(")[2]


def _inner_pids(pid: int) -> tuple[int, ...]:
    """proc(5) NSpid without its first, the pid as we see it; all of it for a process that shares
    our pid namespace."""
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("NSpid:"):
                chain = tuple(map(int, line.split()[1:]))
                return chain[1:] or chain
    return (pid,)


def _maps_libcuda(pid: int) -> bool:
    with open(f"/proc/{pid}/maps", "rb") as file:
        return _LIBRARY in file.read()


def _says_frozen(path: str, marks: tuple[str, ...]) -> bool:
    try:
        with open(path, encoding="ascii") as file:
            return any(line.startswith(marks) for line in file)
    except OSError:
        return False


def _v2(path: str) -> list[str]:
    return _directories(path, "cgroup2", "")


def _v1_freezer(path: str) -> list[str]:
    return _directories(path, "cgroup", "freezer")


def _directories(path: str, kind: str, controller: str) -> list[str]:
    """Where a cgroup path of this hierarchy is to be found under our mounts."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            fields, (fstype, _, options) = left.split(), right.split(None, 2)
            if fstype != kind or (controller and controller not in options.strip().split(",")):
                continue
            root, mountpoint = fields[3].rstrip("/"), fields[4]
            if path == root or path.startswith(root + "/"):
                found.append(mountpoint + path[len(root) :])
    return found
