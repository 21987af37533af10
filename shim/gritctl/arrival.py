"""A checkpoint that comes from another node, as it lands on the disk: names, sizes and the order
of things are the peer's word, and none is believed.

Everything goes into a draft, which becomes a checkpoint only when its manifest and SHA256SUMS have
been compared with every byte of it. Until then, whatever happens leaves nothing. A block of a file
is digested and synced when all of it has come: the others are still on their way then, and the
container stands still when they have come.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager

from shim import checkpoint_dir, digests, offsets
from shim.checkpoint_dir import Draft

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_BESIDE = {
    checkpoint_dir.ROOTFS_DIFF,
    checkpoint_dir.CONTAINER_LOG,
    checkpoint_dir.CONFIG_DUMP,
    checkpoint_dir.SPEC_DUMP,
    checkpoint_dir.SUMS,
    checkpoint_dir.SUMS + checkpoint_dir.SIGNATURE,
}
_MOST_FILES = 1 << 16
_LEFT_FREE = 1 << 30
"""Bytes of the file system that stay free, or a twentieth of it where that is less."""


class ArrivalError(Exception):
    """What the peer sends is not taken; says why."""


class Arrival:
    """One checkpoint on its way into `directory`, which must not exist. `write` is for any number
    of threads. `room` is how many bytes the peer expects to send, `algorithm` what its digests will
    be of. Raises ArrivalError or CheckpointDirError."""

    def __init__(self, directory: str, room: int, algorithm: str = digests.SHA256) -> None:
        if os.path.lexists(directory):
            raise ArrivalError(f"there is a {directory} already")
        self.directory = directory
        self._draft = Draft.begin(directory)
        self._algorithm = algorithm
        self._sizes: dict[str, int] = {}
        self._blocks: dict[tuple[str, int], _Block] = {}
        self._lock = threading.Condition()
        self._writing = 0
        self._sealed = False
        try:
            os.mkdir(os.path.join(self._draft.path, checkpoint_dir.IMAGES), 0o700)
            found = os.statvfs(self._draft.path)
            least = min(_LEFT_FREE, found.f_blocks * found.f_frsize // 20)
            self._room = found.f_bavail * found.f_frsize - least
            if room > self._room:
                raise ArrivalError(
                    f"{os.path.dirname(directory)} has room for {max(self._room, 0)} bytes, and "
                    f"{room} or more are to come"
                )
        except BaseException:
            self._draft.discard()
            raise

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Raises ArrivalError for a name or a size that it does not take, OSError."""
        with self._open(name, offset + len(data)) as fd:
            offsets.write(fd, data, offset)
            self._digest_ahead(fd, name, offset, len(data))

    def leave_hole(self, name: str, offset: int, size: int) -> None:
        """Zeros, where nothing was written before. Raises as `write`."""
        with self._open(name, offset + size):
            pass

    def publish(self, sizes: Mapping[str, int]) -> None:
        """Makes it the checkpoint `directory`, of just the files of these sizes in bytes. From here
        on nothing is taken any more. Raises ArrivalError, CheckpointDirError or OSError."""
        self._seal()
        for name, size in sizes.items():
            if size and size > self._sizes.get(name, 0):
                raise ArrivalError(f"of {name} not all has come")
        for name in {*self._sizes, *sizes}:
            path = os.path.join(self._draft.path, _checked(name))
            if name not in sizes:
                os.unlink(path)
                continue
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            try:
                os.ftruncate(fd, sizes[name])
            finally:
                os.close(fd)
        inside = checkpoint_dir.IMAGES + "/"
        known = {
            (name.removeprefix(inside), number): block.digest
            for (name, number), block in self._blocks.items()
            if block.digest and name.startswith(inside)
            if (number + 1) * digests.BLOCK <= sizes.get(name, 0)
        }
        self._draft.publish_copy({self._algorithm: known})

    def discard(self) -> None:
        """Removes what has come; nothing once it is published. Raises CheckpointDirError."""
        self._seal()
        self._draft.discard()

    def remove(self) -> None:
        """Removes it, published or not. Raises CheckpointDirError."""
        self._seal()
        if self._draft.published:
            checkpoint_dir.remove(self.directory)
        else:
            self._draft.discard()

    def _digest_ahead(self, fd: int, name: str, offset: int, size: int) -> None:
        """Notes what was written; digests and syncs the block that is whole by that."""
        first, last = offset // digests.BLOCK, (offset + max(size, 1) - 1) // digests.BLOCK
        with self._lock:
            for number in range(first, last + 1):
                block = self._blocks.setdefault((name, number), _Block())
                block.digest, block.writes = b"", block.writes + 1
            block.parts[offset] = size
            writes = block.writes
            if block.was_whole or sum(block.parts.values()) < digests.BLOCK:
                return  # what is changed once more is left to the end
            block.was_whole = True
        start = last * digests.BLOCK
        path = os.path.join(self._draft.path, name)
        digest = digests.of_block(path, start, start + digests.BLOCK, self._algorithm)
        os.fdatasync(fd)
        with self._lock:
            if block.writes == writes:
                block.digest = digest

    @contextmanager
    def _open(self, name: str, end: int) -> Iterator[int]:
        path = os.path.join(self._draft.path, _checked(name))
        with self._lock:
            if self._sealed:
                raise ArrivalError(f"{name} comes after the end")
            had = self._sizes.get(name, 0)
            if end - had > self._room:
                raise ArrivalError(f"{name} is to reach {end} bytes: there is no room for that")
            if name not in self._sizes and len(self._sizes) >= _MOST_FILES:
                raise ArrivalError(f"more than {_MOST_FILES} files are to come")
            self._sizes[name] = max(had, end)
            self._room -= max(end - had, 0)
            self._writing += 1
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            with self._lock:
                self._writing -= 1
                self._lock.notify_all()

    def _seal(self) -> None:
        """Waits for what is being written: nothing may change once it was looked at."""
        with self._lock:
            self._sealed = True
            self._lock.wait_for(lambda: not self._writing)


class _Block:
    """Of a file: what has come of it (bytes by offset), how often something has, and the digest of
    what is there, b"" if it was not taken or no longer is right."""

    __slots__ = ("digest", "parts", "was_whole", "writes")

    def __init__(self) -> None:
        self.parts: dict[int, int] = {}
        self.writes = 0
        self.was_whole = False
        self.digest = b""


def _checked(name: str) -> str:
    """A file of the layout, or of the image directory in it: no path leads elsewhere. Raises
    ArrivalError."""
    inside = name.removeprefix(checkpoint_dir.IMAGES + "/")
    if inside == name:
        taken = name in _BESIDE
    else:
        taken = (
            inside[:1] not in ("", ".")
            and "/" not in inside
            and inside.isprintable()
            and len(os.fsencode(inside)) <= 255
        )
    if not taken:
        raise ArrivalError(f"{name[:300]!r} is no file of a checkpoint")
    return name
