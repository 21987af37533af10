"""SysV shared memory that a container has in common with processes outside it.

The containers of a pod share one IPC namespace. CRIU writes every segment of it into the images of
each container, and makes them all anew at a restore: the first container that comes back makes
them, and the next fails. Reads only /proc.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    Segment = tuple[str, str]

_NAME = "/SYSV"
"""How /proc/PID/maps begins a segment's name, which ends in its key (ipc/shm.c: newseg)."""


def against_dump(pids: list[int]) -> list[str]:
    """Each segment that both one of the processes and one not among them has attached, in words,
    with who they are. Only processes of the same IPC namespace are looked at."""
    own = {pid: found for pid in pids if (found := _attached(pid))}
    if not own:
        return []
    namespaces = {_ipc_namespace(pid) for pid in own}
    inside = set(pids)
    problems = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in inside or _ipc_namespace(int(name)) not in namespaces:
            continue
        theirs = _attached(int(name))
        for pid, ours in own.items():
            if _ipc_namespace(pid) == _ipc_namespace(int(name)):
                problems += [
                    f"{named(pid)} shares the SysV memory segment with key 0x{ours[segment]} with "
                    f"{named(int(name))} outside the container, and CRIU cannot restore one "
                    "segment for two containers: have the application use a file in /dev/shm "
                    "(shm_open)"
                    for segment in sorted(ours.keys() & theirs.keys())
                ]
    return problems


def named(pid: int) -> str:
    """A process by pid and name, as far as it is there."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f"pid {pid} ({file.read().strip()})"
    except OSError:
        return f"pid {pid}"


def _attached(pid: int) -> dict[Segment, str]:
    """The segments in a process's memory, by device and inode (which is the segment's id), with
    their keys in hexadecimal."""
    found = {}
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                if _NAME in line:
                    _, _, _, device, inode, path = line.split(None, 5)
                    if path.startswith(_NAME):
                        found[device, inode] = path[len(_NAME) :].split()[0]
    except OSError:
        pass  # it has ended
    return found


def _ipc_namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/ipc")
    except OSError:
        return ""
