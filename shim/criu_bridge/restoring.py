"""The CRIU that runc starts for a restore: ours to watch, though not ours.

runc reads from CRIU's socket until it is closed, and processes that are being restored hold it open
while they wait for CRIU. So a CRIU that is killed, or stands still, leaves runc, and with it the
Start call, waiting for ever (seen with runc 1.3, CRIU 4.2). Here all of them are ended then.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time

from shim import group

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_LOOK_S = 0.1
_GRACE_S = 1.0
"""How long runc may take to see that its CRIU has ended."""

_MNT_DETACH = 2

DIED = "CRIU was killed or crashed in the middle of the restore"


class Watch:
    """Watches the restore in `bundle` that the shim `inner` has runc do, from `with` to its end.
    `ended` says afterwards why it was ended, "" if it was not."""

    def __init__(self, inner: int, bundle: str, deadline_s: float) -> None:
        self.ended = ""
        self._inner = inner
        self._bundle = bundle
        self._deadline_s = deadline_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="restore-watch", daemon=True)
        self._seen: dict[int, int] = {}
        """CRIU and what it has started, by pid with the start time: a pid alone may be somebody
        else's later."""
        self._others: list[int] = []
        """What ran below the inner shim before: a container's own program may be named criu."""

    def __enter__(self) -> Watch:
        self._others = _children(self._inner)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        dead_since = 0.0
        while not self._over.wait(_LOOK_S):
            runc = self._runc()
            if not runc:
                continue
            self._seen |= {pid: group.start_time(pid) for pid in _descendants(runc)}
            now = time.monotonic()
            if not any(_died(pid) for pid in _children(runc)):
                dead_since = 0.0
            elif not dead_since:
                dead_since = now
            if dead_since and now - dead_since > _GRACE_S:
                self._end(DIED)
            elif now - began > self._deadline_s:
                self._end(
                    f"the restore was not done within the {self._deadline_s:g} s of "
                    "restore_timeout, and was ended"
                )

    def _runc(self) -> int:
        """The pid of the `runc restore` under way; 0 before and after."""
        for pid in _children(self._inner):
            words = _words(pid)
            if b"restore" in words and self._bundle.encode() in words:
                return pid
        return 0

    def _end(self, why: str) -> None:
        """Ends CRIU and all that it has brought back. Not runc: it removes what it has recorded of
        the container when CRIU's socket closes, and would leave it if it were killed."""
        self.ended = self.ended or why
        # What lost its parent before it was looked at is the inner shim's now, by CRIU's name.
        ours = set(_children(self._inner)) - set(self._others)
        orphans = [pid for pid in ours if _is_criu(pid)]
        for pid in [*self._seen, *orphans]:
            self._seen.setdefault(pid, group.start_time(pid))
            self._seen |= {below: group.start_time(below) for below in _descendants(pid)}
        for pid, started in self._seen.items():
            if started and group.start_time(pid) == started:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass


def end_left(inner: int, cgroups_path: str) -> None:
    """Kills what a CRIU that was killed had already put into the container's control group, and
    waits for the end of it: runc, and the inner shim, look no further than their own children.
    `cgroups_path` is the specification's; one of systemd's is `slice:prefix:name`."""
    if not cgroups_path:
        return
    *_, prefix, name = ("", "", *cgroups_path.split(":"))
    group_name = f"/{prefix}-{name}.scope" if prefix else f"/{name.strip('/')}"
    for pid in list(_descendants(inner)):
        try:
            with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="replace") as file:
                there = any(line.rstrip("\n").endswith(group_name) for line in file)
            process = os.pidfd_open(pid) if there else -1
        except OSError:
            continue  # it has ended
        if process >= 0:
            try:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], _GRACE_S)
            except ProcessLookupError:
                pass
            finally:
                os.close(process)


def clear(work: str) -> None:
    """Takes away the trees of control groups that a CRIU which was killed has left mounted in its
    work directory (CRIU 4.2 criu/cgroup.c: .criu.cgyard.XXXXXX); with them there it cannot be
    removed. Raises OSError."""
    for name in os.listdir(work):
        if name.startswith(".criu.") and os.path.isdir(path := os.path.join(work, name)):
            while os.path.ismount(path):
                _detach(path)
            os.rmdir(path)


def _detach(path: str) -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def _children(pid: int) -> list[int]:
    """proc_pid_task_tid_children(5); CRIU needs it of the kernel, too."""
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except OSError:
        pass  # it has ended, or one of its threads has
    return found


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _died(pid: int) -> bool:
    """Whether it is a CRIU that has ended and that runc has not asked for."""
    return _is_criu(pid, state=b"Z")


def _is_criu(pid: int, state: bytes = b"") -> bool:
    """Whether it goes by CRIU's name, as what CRIU restores does until late; in that `state`, or in
    any."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            name, _, rest = file.read().partition(b"(")[2].rpartition(b")")
    except OSError:
        return False
    return name.startswith(b"criu") and state in (b"", rest.split()[0])


def _words(pid: int) -> list[bytes]:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().split(b"\0")
    except OSError:
        return []
