"""A checkpoint sent to another node while it is written, by several streams.

Nobody tells when a file is written to its end, so this guesses: a chunk is sent once the file has
data everywhere in it, and what was sent is remembered by its digest. When the images are published
each chunk is read once more, and sent again where it has become another. Only the pages are not,
which CRIU and the lane write from front to end: what they have gone past is settled. Should that
not hold, the other node finds it by the manifest's digests, and the container runs on here.

A chunk always goes by the same stream: a later one cannot be overtaken by an earlier one.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
import zlib

from shim import checkpoint_dir, digests, lane, offsets
from shim.gritctl import wire
from shim.gritctl.saving import SavingError
from shim.gritctl.wire import Connection, PeerFailed, WireError
from shim.manifest import MANIFEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.gritctl.progress import Display

    Jobs = queue.SimpleQueue["Job | None"]

_LOOK_SECONDS = 0.02
_REST = 50
"""How many times as long as a look took (on a processor) there is none."""
_ANSWER_SECONDS = 30.0
_REASON_SECONDS = 5.0
_MANIFEST = f"{checkpoint_dir.IMAGES}/{MANIFEST}"
_DRAFT = f".{checkpoint_dir.IMAGES}."  # how the name of the shim's own draft begins
_APPENDED = tuple(f"{checkpoint_dir.IMAGES}/{prefix}" for prefix in ("pages-", lane.PREFIX))


class InDoubt(Exception):
    """Whether the container runs on the other node is not known; here it is paused."""


class Job:
    """A chunk of a file, `name` within the checkpoint, now at `path` below its directory."""

    __slots__ = ("final", "name", "number", "path")

    def __init__(self, name: str, path: str, number: int, *, final: bool) -> None:
        self.name, self.path, self.number, self.final = name, path, number, final


class Sending:
    """One checkpoint to the node at the other end of `control` and `streams`; `there` is its name
    for messages. The node has `seconds` to restore it, during which the container stands still.
    `encrypted` images are written in any order."""

    def __init__(
        self,
        control: Connection,
        streams: list[Connection],
        display: Display,
        container: str,
        there: str,
        seconds: float,
        *,
        encrypted: bool = False,
    ) -> None:
        self.bytes = 0
        """Sent so far."""
        self._control, self._streams = control, streams
        self._display, self._container, self._there = display, container, there
        self._seconds = seconds
        self._algorithm = _algorithm()
        self._appended = () if encrypted else _APPENDED
        self._sent: dict[tuple[str, int], bytes] = {}
        self._settled: dict[tuple[str, int], int] = {}
        """In which inode."""
        self._failure: Exception | None = None
        self._committed = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._looked = threading.Event()
        """The images were gone over for the last time."""
        self._top = -1
        """The checkpoint's directory, or that of what is to become one: a descriptor, as it is
        renamed meanwhile."""
        self._jobs: list[Jobs] = [queue.SimpleQueue() for _ in streams]
        self._senders = [
            threading.Thread(target=self._send_all, args=one, daemon=True)
            for one in zip(streams, self._jobs, strict=True)
        ]
        self._looking: threading.Thread | None = None

    def follow(self, directory: str) -> None:
        """Sends what is written below `directory`, from now on. Raises SavingError."""
        try:
            self._top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise SavingError(f"{directory}: {error.strerror}") from error
        for thread in self._senders:
            thread.start()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()

    def check(self) -> None:
        """Raises SavingError if it has failed already."""
        if not self._committed and self._control.has_news():  # there is nothing to say yet
            self._fail(WireError("the connection was cut"))
        if self._failure is not None:
            raise SavingError(f"{self._there}: {self._reason()}")

    def deliver(self, idle: Callable[[], None]) -> None:
        """Sends what is left of the checkpoint, which is whole now, and has it restored there.

        Raises SavingError, or what `idle` raises: then nothing of it is left there. Raises InDoubt
        if the other node was told to let it live and did not answer."""
        try:
            self._deliver(idle)
        except BaseException:
            self.close()  # before anything runs here again: it is what ends it there
            raise

    def _deliver(self, idle: Callable[[], None]) -> None:
        self._stopped.set()
        if self._looking:
            self._looking.join()
        with self._display.phase(self._container, "send") as phase:
            sizes = {}
            for name, path in _files(self._top):
                sizes[name] = self._size(path)
                if not (self._looked.is_set() and "/" in name):
                    self._put_all(name, path, sizes[name])
            for jobs in self._jobs:
                jobs.put(None)
            for thread in self._senders:
                while thread.is_alive():
                    thread.join(_LOOK_SECONDS)
                    phase.at(self.bytes)
                    idle()
            self.check()
            phase.at(self.bytes)
        waiting = wire.within(self._seconds, idle)
        try:
            self._committed = True
            with self._display.phase(self._container, "verify"):
                self._control.send("commit", files=sizes)
                self._control.expect("stored", waiting)
            with self._display.phase(self._container, "restore"):
                self._control.expect("runs", waiting)
        except WireError as error:
            raise SavingError(f"{self._there}: {error}") from error
        # From here on only the other node decides: it ends its container unless it hears this.
        try:
            self._control.send("keep")
            self._control.expect("kept", wire.within(_ANSWER_SECONDS))
        except WireError as error:
            raise InDoubt(
                f"{self._there} had the container running and did not answer at the last word: "
                f"{error}"
            ) from error

    def close(self) -> None:
        """Ends the connections; a container that was not delivered is ended there by that."""
        self._stopped.set()
        for one in (self._control, *self._streams):
            one.cut()
        for jobs in self._jobs:
            jobs.put(None)
        for thread in (*self._senders, self._looking):
            if thread is not None and thread.ident is not None:
                thread.join()
        for one in (self._control, *self._streams):
            one.close()
        if self._top >= 0:
            os.close(self._top)
            self._top = -1

    def _look(self) -> None:
        begun: dict[str, int] = {}
        took = 0.0
        try:
            while not self._stopped.wait(max(_LOOK_SECONDS, _REST * took)):
                began = time.thread_time()
                found = dict(_files(self._top))
                published = found.get(_MANIFEST) == _MANIFEST
                for name in begun.keys() - found.keys():  # taken back; another may come
                    del begun[name]
                    self._unsettle(name)
                for name, path in found.items():
                    inside = "/" in name
                    if inside and self._looked.is_set():
                        continue
                    try:
                        size = self._size(path)
                        if inside and published:
                            self._put_all(name, path, size)
                        elif size >= wire.CHUNK:
                            begun[name] = self._put_written(name, path, begun.get(name, 0))
                    except FileNotFoundError:
                        if inside and published:
                            raise
                        # Renamed meanwhile, or taken back.
                if published:
                    self._looked.set()
                took = time.thread_time() - began
        except OSError as error:
            self._fail(error)

    def _put_written(self, name: str, path: str, number: int) -> int:
        """Has the chunks from `number` on sent that are written, as far as can be seen; the number
        of the first that is not."""
        fd = self._open(path)
        try:
            while True:
                whole = os.lseek(fd, number * wire.CHUNK, os.SEEK_HOLE) // wire.CHUNK
                while number < whole:
                    self._put(Job(name, path, number, final=False))
                    number += 1
                behind = os.lseek(fd, (number + 1) * wire.CHUNK, os.SEEK_DATA)
                number = max(number + 1, behind // wire.CHUNK)  # zeros between, until later
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return number  # nothing is there yet
        finally:
            os.close(fd)

    def _unsettle(self, name: str) -> None:
        for key in [key for key in list(self._settled) if key[0] == name]:
            self._settled.pop(key, None)

    def _put_all(self, name: str, path: str, size: int) -> None:
        for number in range(-(-size // wire.CHUNK)):
            self._put(Job(name, path, number, final=True))

    def _put(self, job: Job) -> None:
        stream = (zlib.crc32(job.name.encode()) + job.number) % len(self._jobs)
        self._jobs[stream].put(job)

    def _send_all(self, stream: Connection, jobs: Jobs) -> None:
        buffer = memoryview(bytearray(wire.CHUNK))
        try:
            while (job := jobs.get()) is not None:
                self._send(stream, job, buffer)
            stream.send("sync")
            stream.expect("synced")
        except (WireError, OSError) as error:
            self._fail(error)

    def _send(self, stream: Connection, job: Job, buffer: memoryview) -> None:
        key, start = (job.name, job.number), job.number * wire.CHUNK
        try:
            fd = self._open(job.path)
        except FileNotFoundError:
            if job.final:
                raise
            return  # renamed: it comes again
        try:
            file = os.fstat(fd)
            if job.final and self._settled.get(key) == file.st_ino:
                return
            if job.final and key not in self._sent:
                size = min(file.st_size - start, wire.CHUNK)
                if offsets.is_hole(fd, start, size):
                    stream.send("hole", file=job.name, offset=start, length=size)
                    return
            settled = job.name.startswith(self._appended) and not offsets.is_hole(
                fd, start + wire.CHUNK, wire.CHUNK
            )  # asked before it is read
            chunk = buffer[: offsets.read(fd, buffer, start)]
        finally:
            os.close(fd)
        digest = digests.new(self._algorithm)
        digest.update(chunk)
        found = digest.digest()
        if self._sent.get(key) != found:
            stream.send("chunk", chunk, file=job.name, offset=start)
            self._sent[key] = found
            with self._lock:
                self.bytes += len(chunk)
        if settled:
            self._settled[key] = file.st_ino

    def _open(self, path: str) -> int:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)

    def _size(self, path: str) -> int:
        return os.stat(path, dir_fd=self._top, follow_symlinks=False).st_size

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = self._failure or error

    def _reason(self) -> str:
        """What failed: on the control connection the other node says more than a cut stream."""
        if not isinstance(self._failure, WireError):
            return str(self._failure)
        try:
            self._control.expect("failed", wire.within(_REASON_SECONDS))
        except PeerFailed as error:
            return str(error)
        except WireError:
            pass
        return str(self._failure)


def _files(top: int) -> Iterator[tuple[str, str]]:
    """The files of a checkpoint, or of what is to become one: name in it, and path from `top`."""
    for entry in _entries(top):
        if entry.is_file(follow_symlinks=False):
            if entry.name[0] != ".":
                yield entry.name, entry.name
        elif entry.name == checkpoint_dir.IMAGES or entry.name.startswith(_DRAFT):
            try:
                inside = os.open(entry.name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=top)
            except FileNotFoundError:
                continue  # published meanwhile
            try:
                names = [image.name for image in _entries(inside)]
            finally:
                os.close(inside)
            for name in names:
                yield f"{checkpoint_dir.IMAGES}/{name}", f"{entry.name}/{name}"


def _entries(directory: int) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)


def _algorithm() -> str:
    """Only to tell chunks apart: the quickest there is."""
    try:
        digests.new(digests.XXH3)
    except digests.Unavailable:
        return digests.SHA256
    return digests.XXH3
