"""The freezer of one cgroup directory, v1 (`freezer.state`) or v2 (`cgroup.freeze`).

CRIU thaws a frozen cgroup once its processes are ptrace-stopped and writes FROZEN again just
before it lets go; a CRIU that is killed in between leaves the cgroup thawed. This module reads
the state before a dump and puts it back after such an end. It must only write to a freezer it
was told to put back.
"""

from __future__ import annotations

import os
import time

FROZEN = "FROZEN"
FREEZING = "FREEZING"
THAWED = "THAWED"


def state(cgroup: str) -> str | None:
    """FROZEN, FREEZING or THAWED; None where the directory has no freezer (or is gone)."""
    v1 = _read(os.path.join(cgroup, "freezer.state"))
    if v1 is not None:
        return v1.strip()
    wanted = _read(os.path.join(cgroup, "cgroup.freeze"))
    events = _read(os.path.join(cgroup, "cgroup.events"))
    if wanted is None or events is None:
        return None
    if wanted.strip() != "1":
        return THAWED
    return FROZEN if "frozen 1" in events else FREEZING


def put_back(cgroup: str, wanted: str, timeout_s: float) -> bool:
    """Freeze or thaw until `state` is `wanted` (FROZEN or THAWED), or the time is up.

    Returns whether it is. A cgroup that has gone counts as not: its processes are dead.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = state(cgroup)
        if now == wanted:
            return True
        if now is None or time.monotonic() > deadline:
            return False
        try:
            ask(cgroup, wanted)
        except OSError:
            return False
        # cgroup.events can be polled, freezer.state cannot: one way for both.
        time.sleep(0.01)


def ask(cgroup: str, wanted: str) -> None:
    """Asks for FROZEN or THAWED, and does not wait for it. Raises OSError."""
    v1 = os.path.join(cgroup, "freezer.state")
    if os.path.exists(v1):
        path, text = v1, wanted
    else:
        path, text = os.path.join(cgroup, "cgroup.freeze"), "1" if wanted == FROZEN else "0"
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return None
