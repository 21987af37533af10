"""Work on a disk that may never answer, as an NFS server that has gone does not.

Nothing ends a thread that waits for such a disk. So the work gets a thread of its own, which is
left to itself when its time is over: whoever holds a frozen container must be able to go on.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


class DiskHangs(Exception):
    """The work was not done in its time. It may still be, when the disk answers."""


def within(seconds: float, what: str, work: Callable[[], T]) -> T:
    """What `work` returns or raises; DiskHangs, which begins with `what`, after `seconds`."""
    came: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            came.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="disk", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise DiskHangs(f"{what} within {seconds:g} s: the disk does not answer")
    if failed:
        raise failed[0]
    return came[0]
