"""A file's bytes by their offset: what the kernel does in part is done to the end. All raise
OSError."""

from __future__ import annotations

import errno
import os


def write(fd: int, data: memoryview | bytes, at: int) -> None:
    left = memoryview(data)
    while left:
        count = os.pwrite(fd, left, at)
        left, at = left[count:], at + count


def read(fd: int, buffer: memoryview, at: int) -> int:
    """How much of the buffer was filled: less than all where the file ends."""
    done = 0
    while done < len(buffer):
        count = os.preadv(fd, [buffer[done:]], at + done)
        if not count:
            break
        done += count
    return done


def is_hole(fd: int, at: int, size: int) -> bool:
    """Whether no data begins within these `size` bytes, which read as zeros then."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA) >= at + size
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True  # nothing but holes from here on
        raise
