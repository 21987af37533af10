"""The run directory of a group of tasks that share one shim, and what is recorded in it.

    <run>/<hash of the address>/
        config.json   the annotation by which the inner shim names its socket
        log           link to the log fifo of the first task's bundle
        answer        what the inner shim's `start` printed
        sockets       where the inner shim may listen
        processes     "<name> <pid> <start time>" for the outer and the inner shim
        tasks/<id>    the bundle of each task, for a `delete` that finds the daemon dead
    over          there while its last task is gone: it is about to end

`start` makes it, the daemon keeps it, the daemon's end or `delete` removes it. Whoever makes or
removes it, and with it the sockets, holds its `lock`: a group that ends may begin again at once.
"""

from __future__ import annotations

import os

from shim import lean_json

_ENDED = (b"Z", b"X")  # states of proc(5): waits to be reaped, is being reaped
_PF_EXITING = 4  # of its flags: linux/sched.h


def lock(group: str) -> int:
    """Makes the directory if need be and locks it against other processes until the descriptor
    returned is closed; waits its turn."""
    import fcntl

    while True:
        os.makedirs(group, mode=0o700, exist_ok=True)
        try:
            fd = os.open(group, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            if os.path.samestat(os.fstat(fd), os.stat(group)):
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)  # removed, and perhaps made anew, while we waited


def prepare(group: str, grouping: str, log: str) -> None:
    """Makes the directory a working directory fit for the inner shim's `start`.

    `grouping` becomes the inner's own group, so that its socket's name clashes neither with
    ours nor with that of a stock shim for the same pod (facts 1.8).
    """
    os.makedirs(os.path.join(group, "tasks"), mode=0o700, exist_ok=True)
    name = lean_json.quote(inner_grouping(grouping))
    spec = f'{{"annotations": {{"io.containerd.runc.v2.group": {name}}}}}'
    _write(os.path.join(group, "config.json"), spec)
    link = os.path.join(group, "log")
    if os.path.lexists(link):
        os.unlink(link)
    os.symlink(log, link)


def inner_grouping(grouping: str) -> str:
    return f"grit-inner-{grouping}"


def record_answer(group: str, answer: str) -> None:
    _write(os.path.join(group, "answer"), answer)


def answer(group: str) -> str:
    """What the inner shim's `start` printed, "" if it has not been started."""
    return _read(os.path.join(group, "answer"))


def record_sockets(group: str, paths: list[str]) -> None:
    _write(os.path.join(group, "sockets"), "\n".join(paths))


def sockets(group: str) -> list[str]:
    """The inner shim's sockets, whether they are there or not."""
    return _read(os.path.join(group, "sockets")).splitlines()


def record_process(group: str, name: str, pid: int) -> None:
    """Remembers a process by pid and start time: a pid alone may be somebody else's later."""
    with open(os.path.join(group, "processes"), "a", encoding="ascii") as file:
        file.write(f"{name} {pid} {start_time(pid)}\n")


def living_process(group: str, name: str) -> int:
    """The pid of a recorded process that is still the same process and not about to end, else 0.

    One that was killed closes its sockets, and is missed for it, before it is a zombie."""
    for line in reversed(_read(os.path.join(group, "processes")).splitlines()):
        who, pid, started = line.split()
        if who == name:
            fields = _stat(int(pid))
            if not fields or fields[0] in _ENDED or int(fields[6]) & _PF_EXITING:
                return 0
            return int(pid) if fields[19] == started.encode() else 0
    return 0


def start_time(pid: int) -> int:
    """Clock ticks from boot to the start of a process (proc(5), field 22); 0 if it is gone
    or has ended and waits to be reaped."""
    fields = _stat(pid)
    return 0 if not fields or fields[0] in _ENDED else int(fields[19])


def _stat(pid: int) -> list[bytes]:
    """What follows a process's name in proc(5)'s stat, from field 3, its state, on; empty if it is
    gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()
    except OSError:
        return []


def add_task(group: str, container_id: str, bundle: str) -> None:
    unlink(os.path.join(group, "over"))
    _write(os.path.join(group, "tasks", container_id), bundle)


def remove_task(group: str, container_id: str) -> None:
    try:
        os.unlink(os.path.join(group, "tasks", container_id))
        if not os.listdir(os.path.join(group, "tasks")):
            _write(os.path.join(group, "over"), "")
    except FileNotFoundError:
        pass


def is_over(group: str) -> bool:
    """Whether its last task was removed, and no other has come: containerd's Shutdown is under way,
    and whoever joins the group now would lose his connection."""
    return os.path.exists(os.path.join(group, "over"))


def tasks(group: str) -> dict[str, str]:
    """The bundles of the group's tasks by container id."""
    folder = os.path.join(group, "tasks")
    try:
        return {name: _read(os.path.join(folder, name)) for name in os.listdir(folder)}
    except FileNotFoundError:
        return {}


def unlink(path: str) -> None:
    """Removes a file; one that is gone already is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def remove(group: str) -> None:
    """Removes the directory with all in it; one that is gone already is fine."""
    for folder, _, files in os.walk(group, topdown=False):
        for name in files:
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return ""
