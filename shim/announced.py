"""Where a checkpoint is going to lie, told before the Pause that comes ahead of it.

A Pause names no directory, so whatever has one to write to can begin only in the Checkpoint, with
the container frozen. A client that knows it says so in a file, one per container, that holds the
image directory's path and is kept locked (flock) for as long as the client means it: one that was
killed has announced nothing. The client's half and the shim's; whoever may not write there goes
without.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager

from shim import group, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def announcing(namespace: str, container: str, directory: str) -> Iterator[None]:
    """To be held around a Pause. `directory` is the `image_path` of the Checkpoint to come; its
    parent exists."""
    path = _path(namespace, container)
    try:
        file = _written(path, os.path.realpath(directory))
    except OSError:
        file = None  # without it the container stands still for longer, and nothing else
    try:
        yield
    finally:
        if file is not None:
            group.unlink(path)
            os.close(file)


def directory(namespace: str, container: str) -> str:
    """What a client that lives has announced for the container; "" if none has."""
    path = _path(namespace, container)
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.fsdecode(os.read(file, 1 << 16))
    except OSError:
        return ""
    finally:
        os.close(file)
    group.unlink(path)  # of a client that was killed
    return ""


def _written(path: str, text: str) -> int:
    """The file, open and locked. Raises OSError."""
    os.makedirs(places.ANNOUNCED, mode=0o700, exist_ok=True)
    new = f"{path}~{os.getpid()}"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(file, os.fsencode(text))
        os.rename(new, path)
    except OSError:
        group.unlink(new)
        os.close(file)
        raise
    return file


def _path(namespace: str, container: str) -> str:
    return os.path.join(places.ANNOUNCED, f"{namespace},{container}")
