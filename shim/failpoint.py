"""Named places between the phases of a checkpoint and of a restore, where a test can hold the
daemon, or have it fail or die. They do nothing unless the environment variable GRIT_FAILPOINTS
names a directory; then `reach(name)` looks there for an entry called `name`:

    a file  its text is the action, taken at once
    a fifo  the daemon writes its pid into it, and takes the action it then reads from it; the
            reader of the pid is to close it before it writes

    action    "" or "go": go on. "raise": raise Reached. "kill": SIGKILL to the daemon. The name of
              an errno, "ENOSPC": raise that OSError

An entry counts once: it is removed before its action is taken.
"""

from __future__ import annotations

import os

CHECKPOINT = (
    "lock",
    "copy",  # only where the driver engine copies device memory
    "freeze",
    "look-again",  # for processes that took up CUDA in between
    "lane",  # only where device memory is to go past CRIU; before "freeze" if it was announced
    "drop",  # the same
    "dump",
    "publish",  # under its final name what CRIU has written
    "let-go",  # CRIU of the processes
    "thaw",
    "refill",  # only where memory was dropped; before "thaw" if the dump failed
    "give-back",  # the GPU, where there is one
)
RESTORE = ("verify", "create", "fill", "restore", "restore-gpu", "restored")
"""The names, in the order of a checkpoint, and of a restore."""

_DIRECTORY = os.environ.get("GRIT_FAILPOINTS", "")


class Reached(Exception):
    """The error that a test asked for."""


def reach(name: str) -> None:
    """To be called right before the phase `name` begins."""
    if _DIRECTORY:
        _act(name, os.path.join(_DIRECTORY, name))


def _act(name: str, path: str) -> None:
    import errno
    import stat

    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            with open(path, "w", encoding="ascii") as fifo:
                fifo.write(f"{os.getpid()}\n")
        with open(path, encoding="ascii") as entry:
            action = entry.read().strip()
        os.unlink(path)
    except FileNotFoundError:
        return
    if action == "raise":
        raise Reached(f"failpoint {name}")
    if action == "kill":
        os.kill(os.getpid(), 9)
    elif action not in ("", "go"):
        code: int = getattr(errno, action)
        raise OSError(code, os.strerror(code), f"failpoint {name}")
