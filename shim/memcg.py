"""A control group's memory limits, on cgroup v1 and v2 alike: which are in force, how much may yet
be charged under each, and how to change one. Mechanism only: what a limit means for a checkpoint
is for `headroom` to say. Never writes a limit below what is in use: on v2 the kernel would make
room by killing.
"""

from __future__ import annotations

import errno
import os
import time

# (limit, usage); v2 first. Over memory.high nothing is killed, but the group is slowed down until
# a copy of gigabytes does not end.
_FILES = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)
# Page cache, which gives way: v1's sums over the groups below come first, where v2 has only sums.
_CACHE = (("total_inactive_file", "total_active_file"), ("inactive_file", "active_file"))
_UNLIMITED = 1 << 62  # v1 has no word for it: the largest multiple of a page
_POLL_SECONDS = 0.02


class Limit:
    """A limit in force. `file` is where it is written, `group` whose it is, `value` its bytes,
    `free` the bytes that may yet be charged, page cache counted as free; below 0 where more is
    in use than that."""

    __slots__ = ("file", "free", "group", "value")

    def __init__(self, file: str, group: str, value: int, free: int) -> None:
        self.file = file
        self.group = group
        self.value = value
        self.free = free


def limits(group: str) -> list[Limit]:
    """The limits of the group in this directory and of all above it that we see, from the
    innermost outwards."""
    found = []
    while os.path.exists(os.path.join(group, "cgroup.procs")):
        found += [limit for name, _ in _FILES if (limit := _limit(os.path.join(group, name)))]
        group = os.path.dirname(group)
    return found


def value(file: str) -> int | None:
    """What a limit is set to, in bytes; None for no limit. Raises OSError if it is gone."""
    with open(file, encoding="ascii") as opened:
        text = opened.read().strip()
    return None if text == "max" or int(text) >= _UNLIMITED else int(text)


def set_limit(file: str, bytes_: int) -> None:
    """Raises OSError."""
    with open(file, "w", encoding="ascii") as opened:
        opened.write(str(bytes_))


def lower(file: str, bytes_: int, patience: float) -> bool:
    """Sets a limit once what is in use fits below it; False if it has not within `patience`
    seconds. Raises OSError, FileNotFoundError if the group is gone."""
    deadline = time.monotonic() + patience
    while True:
        if _in_use(file) <= bytes_:
            try:
                set_limit(file, bytes_)
                return True
            except OSError as error:
                if error.errno != errno.EBUSY:  # v1, where reclaim did not get there
                    raise
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)


def _limit(file: str) -> Limit | None:
    """None where the kernel has no such limit, or none is set."""
    try:
        set_to = value(file)
        if set_to is None:
            return None
        return Limit(file, os.path.dirname(file), set_to, set_to - _in_use(file))
    except FileNotFoundError:
        return None


def _in_use(file: str) -> int:
    """Bytes charged under a limit that do not give way."""
    group, name = os.path.split(file)
    with open(os.path.join(group, dict(_FILES)[name]), encoding="ascii") as opened:
        usage = int(opened.read())
    with open(os.path.join(group, "memory.stat"), encoding="ascii") as opened:
        stat = dict(line.split() for line in opened)
    names = next((names for names in _CACHE if names[0] in stat), ())
    return usage - sum(int(stat[name]) for name in names)
