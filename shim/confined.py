"""Whose work a checkpoint is, and that it lies where it may: asked before a restore believes it.

A pod's author chooses the path in the annotation, and who can write to a directory on the way can
lead it elsewhere. So below `checkpoint_roots` the kernel itself is told to follow no symbolic link
and no `..` out of the root (openat2(2), Linux 5.6), and every directory from there to the images
must belong to somebody who is trusted: nobody else can put another one in its place afterwards.
"""

from __future__ import annotations

import errno
import os
import stat

from shim import checkpoint_dir
from shim.checkpoint_dir import CheckpointDirError, Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Identity = tuple[int, int]

_OPENAT2 = 437  # the same on every architecture; <linux/openat2.h> has the flags
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08


def untrusted(images: str, trusted: Sequence[int] = ()) -> list[Problem]:
    """What of an image directory, of the one that holds it and of the files beside it, users other
    than root, us and the `trusted` could have written: it belongs to them, or its mode lets them
    write. The restored processes get whatever rights the images say. Raises CheckpointDirError if
    the directory cannot be read."""
    problems = []
    try:
        with os.scandir(images) as entries:
            files = [entry.path for entry in entries]
        place, beside = checkpoint_dir.beside(images)
        for path in [images, *files, *([place] if place else []), *beside]:
            directory = path in (images, place)
            found = os.stat(path, follow_symlinks=directory)
            name = path if directory else os.path.basename(path)
            problems += _mistrusted(name, found, trusted, may_be_sticky=path == place)
    except OSError as error:
        reason = checkpoint_dir.reason(error)
        raise CheckpointDirError(f"cannot read {images}: {reason}") from error
    return problems


def locate(directory: str, roots: Sequence[str], trusted: Sequence[int]) -> Identity | None:
    """Device and inode of a directory beneath one of the `roots`; None if there is none. Raises
    CheckpointDirError where the way there leads out of the root or over a symbolic link, or where
    others could change it."""
    root, steps = _root_of(directory, roots)
    found: Identity | None = None
    for count in range(len(steps) + 1):
        try:
            fd = _open_beneath(root, "/".join(steps[:count]) or ".")
        except FileNotFoundError:
            return None
        except OSError as error:
            what = os.path.join(root, *steps[:count])
            raise CheckpointDirError(
                f"the checkpoint {directory} is not restored: {what} {_refused(error)} "
                f"(checkpoint_roots has {root})"
            ) from error
        try:
            status = os.fstat(fd)
        finally:
            os.close(fd)
        found = status.st_dev, status.st_ino
        name = os.path.join(root, *steps[:count])
        problems = _mistrusted(name, status, trusted, may_be_sticky=True)
        if problems:
            raise CheckpointDirError(
                f"the checkpoint {directory} is not restored, since others could put another in "
                f"its place: {problems[0]}"
            )
    return found


def _root_of(directory: str, roots: Sequence[str]) -> tuple[str, list[str]]:
    """The root above a directory by its name, and the way from there."""
    parts = _parts(directory)
    for root in roots:
        above = _parts(root)
        if directory.startswith("/") and parts[: len(above)] == above:
            return root, parts[len(above) :]
    raise CheckpointDirError(
        f"the checkpoint {directory} is not restored: it does not lie beneath any of "
        f"checkpoint_roots ({', '.join(roots)})"
    )


def _parts(path: str) -> list[str]:
    return [part for part in path.split("/") if part not in ("", ".")]


def _open_beneath(root: str, way: str) -> int:
    """A descriptor of the directory at `way` below `root`. Raises OSError: ELOOP for a symbolic
    link, EXDEV for what leads out of the root."""
    import ctypes
    import struct

    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    how = struct.pack("QQQ", flags, 0, resolve)
    libc = ctypes.CDLL(None, use_errno=True)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd: int = libc.syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_int(top),
            ctypes.c_char_p(os.fsencode(way)),
            ctypes.c_char_p(how),
            ctypes.c_size_t(len(how)),
        )
    finally:
        os.close(top)
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), way)
    return fd


def _refused(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symbolic link"
    if error.errno == errno.EXDEV:
        return "leads out of the root"
    if error.errno == errno.ENOSYS:
        return "cannot be opened safely: this kernel has no openat2, which Linux 5.6 brought"
    return f"cannot be opened: {error.strerror}"


def _mistrusted(
    name: str, found: os.stat_result, trusted: Sequence[int], *, may_be_sticky: bool
) -> list[Problem]:
    """A directory that `may_be_sticky` only has what lies in it to protect: in one with that bit
    others can make new names, and not touch old ones."""
    if found.st_uid not in (0, os.geteuid(), *trusted):
        text = (
            f"belongs to the user {found.st_uid}; it must be root's (chown), or that user one of "
            "trusted_uids"
        )
        return [Problem(name, "owner", text)]
    mode = found.st_mode
    if stat.S_ISLNK(mode) or (may_be_sticky and mode & stat.S_ISVTX):
        return []  # a link has no mode of its own; verify() refuses it
    if mode & stat.S_IWOTH or (mode & stat.S_IWGRP and found.st_gid):
        text = f"may be written by others (mode {mode & 0o7777:04o}; chmod go-w)"
        return [Problem(name, "mode", text)]
    return []
