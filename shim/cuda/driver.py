"""The shim's side of the helper: driver calls that come back in bounded time, or are abandoned.

Starts the helper at the first call and a fresh one after the last was killed or given up. Every
call has a deadline of the shim's own; the driver's timeouts are not trusted. Lean: lives in the
shim, so no cffi, asyncio or subprocess here. Never ask about a frozen process all the same: the
deadline saves the shim, not the minutes.
"""

from __future__ import annotations

import os
import socket
import threading

from shim.cuda import states
from shim.cuda.errors import CallAbandoned, HelperDied, LaneError, LibraryError
from shim.cuda.shards import Shard
from shim.cuda.survey import Survey

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

START_SECONDS = 20.0  # for the helper to start and load libcuda (0.1 s on an idle machine)
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from shim.cuda.helper import main; main(*sys.argv[2:])"
)
_LARGEST_MESSAGE = 65536
_CALLS, _LANES = "calls", "lanes"  # what a helper is for
_KILL_SECONDS = 10.0  # for a killed helper to be gone: it may have to leave a disk first
_DROP_SECONDS = 15.0  # for the last call of a drop, and the thread's stop before the first


class Library:
    """What the helper found: `path` of libcuda, its `cuda_version` e.g. 13000, and which of the
    checkpoint calls are `missing` in it."""

    __slots__ = ("cuda_version", "missing", "path")

    def __init__(self, path: str, cuda_version: int, missing: tuple[str, ...]) -> None:
        self.path = path
        self.cuda_version = cuda_version
        self.missing = missing


class Answer:
    """A driver call that came back: CUresult `code`, its `name` (or why it could not be made),
    `value` of the question, `started` and `ended` in seconds of CLOCK_MONOTONIC."""

    __slots__ = ("code", "ended", "name", "started", "value")

    def __init__(self, code: int, name: str, value: int, started: float, ended: float) -> None:
        self.code = code
        self.name = name
        self.value = value
        self.started = started
        self.ended = ended

    @property
    def ok(self) -> bool:
        return self.code == states.SUCCESS


class Driver:
    """Makes driver calls through a helper process. Thread-safe: calls from several threads run
    in parallel. `python` is an interpreter that can import cffi; `library` a libcuda to load
    instead of searching; `nvidia_command` stands in for calls that this libcuda lacks."""

    def __init__(self, python: str, library: str = "", nvidia_command: str = "") -> None:
        self._arguments = (python, library, nvidia_command)
        self._guard = threading.Lock()
        self._helpers: dict[str, _Helper] = {}
        """One for driver calls, and one for lanes: that is killed where a move takes too long, and
        no driver call may end with it."""

    def library(self) -> Library:
        """What the calls go to. Raises LibraryError where there is none, HelperDied or
        CallAbandoned where the helper does not start."""
        return self._current().wait_until_ready()

    def call(self, action: str, pid: int, *, timeout: float, argument: str = "") -> Answer:
        """One driver call: state, restore_tid, lock (argument: milliseconds), checkpoint
        (argument: those of `prefault.prefaulted` after the pid, with commas), restore (argument:
        device map) or unlock; or the question to NVML that `survey` asks; or shed
        (argument: a forked.Inheritance). Returns within `timeout` seconds of the helper being up.

        Raises CallAbandoned after that, HelperDied where the helper went away meanwhile or does
        not start, LibraryError where libcuda cannot be loaded. A CUresult other than 0 is an
        Answer."""
        helper, call = self._send(action, pid, argument)
        if call.came_back.wait(timeout):
            if call.answer is None:
                raise HelperDied(
                    f"pid {pid}: the CUDA helper (pid {helper.pid}) was killed or crashed during "
                    f"the driver's {action} call"
                )
            return call.answer
        self._retire(helper, call)
        raise CallAbandoned(
            f"pid {pid}: the driver's {action} call did not come back within {timeout:.1f} s and "
            f"was abandoned (CUDA helper pid {helper.pid})"
        )

    def survey(self, pids: list[int] | None, *, timeout: float) -> Survey:
        """What NVML says of the node's GPUs and these processes, None for all there are; one with
        a reason instead where it says nothing. Raises as `call` does."""
        argument = "all" if pids is None else ",".join(map(str, pids))
        answer = self.call("survey", 0, timeout=timeout, argument=argument)
        return Survey.decode(answer.name) if answer.ok else Survey(unknown=answer.name)

    def lane_choose(
        self,
        pid: int,
        wanted: str,
        ranges: list[tuple[int, int]],
        directory: str,
        *,
        threads: int,
        direct: bool,
        timeout: float,
    ) -> tuple[str, str]:
        """choice.choose in a helper: how what `lane_write` writes is to be compressed, and why.
        Raises as lane_write does."""
        given = {
            "wanted": wanted,
            "ranges": ranges,
            "directory": directory,
            "threads": threads,
            "direct": direct,
        }
        import json

        codec, why = json.loads(self._move("lane_choose", pid, given, timeout))
        return codec, why

    def lane_write(
        self,
        pid: int,
        start: int,
        end: int,
        directory: str,
        prefix: str,
        *,
        threads: int,
        direct: bool,
        algorithm: str,
        compression: str = "",
        timeout: float,
    ) -> list[Shard]:
        """lane.write in a helper, within `timeout` seconds of it being up. The process must not
        write there meanwhile.

        Raises LaneError where it failed; no file is left then. CallAbandoned where it took too
        long, HelperDied where the helper went away: it has ended, and its files are left to
        whoever removes the draft. LibraryError and HelperDied where the helper does not start."""
        given = {
            "start": start,
            "end": end,
            "directory": directory,
            "prefix": prefix,
            "threads": threads,
            "direct": direct,
            "algorithm": algorithm,
            "compression": compression,
        }
        import json

        made = self._move("lane_write", pid, given, timeout)
        return [Shard(*plain) for plain in json.loads(made)]

    def lane_fill(
        self,
        pid: int,
        start: int,
        directory: str,
        shards: list[Shard],
        *,
        threads: int,
        fresh: bool,
        algorithm: str,
        timeout: float,
        held: bool = False,
    ) -> None:
        """lane.fill in a helper, within `timeout` seconds of it being up. `shards` are all of a
        range's, in order.

        Raises as lane_write does. Whatever it raises, the process must not run before a fill that
        raised nothing; nothing is still written to it, unless the text of CallAbandoned says so."""
        given = {
            "start": start,
            "directory": directory,
            "shards": [shard.plain() for shard in shards],
            "threads": threads,
            "fresh": fresh,
            "held": held,
            "algorithm": algorithm,
        }
        self._move("lane_fill", pid, given, timeout)

    def lane_check(self, pid: int, shards: list[Shard], *, threads: int, timeout: float) -> None:
        """lane.check in a helper. Raises as lane_write does; LaneError, too, where the memory has
        changed."""
        given = {"shards": [shard.whole() for shard in shards], "threads": threads}
        self._move("lane_check", pid, given, timeout)

    def lane_drop(
        self, group: str, ranges: list[tuple[int, int, int]], *, threads: int, timeout: float
    ) -> None:
        """lane.drop in a helper, which begins nothing after `timeout` seconds.

        Raises LaneError where it failed, or was not done in time: its text says how much is left.
        CallAbandoned and HelperDied as lane_write does: how much is left is not known then, the
        group may be thawed, and a process may be spoiled, if it was in the middle of the call."""
        given = {"group": group, "ranges": ranges, "threads": threads, "seconds": timeout}
        self._move("lane_drop", ranges[0][0], given, timeout + _DROP_SECONDS)

    def close(self) -> None:
        """Lets the helpers go; calls under way fail with HelperDied. A later call starts anew."""
        with self._guard:
            helpers, self._helpers = self._helpers, {}
        for helper in helpers.values():
            helper.kill()

    def _move(self, action: str, pid: int, given: dict[str, Any], timeout: float) -> str:
        """What it found. No move goes on behind the back of a shim that has given it up: the helper
        is killed, and with it what else moves just then."""
        import json

        helper, call = self._send(action, pid, json.dumps(given), _LANES)
        what = f"pid {pid}: the {action}" + (f" of {given['start']:x}" if "start" in given else "")
        if not call.came_back.wait(timeout):
            helper.kill()
            ended = "killed" if helper.gone.wait(_KILL_SECONDS) else "killed but is STILL THERE"
            raise CallAbandoned(
                f"{what} did not come back within {timeout:.1f} s; its helper (pid {helper.pid}) "
                f"was {ended}"
            )
        if call.answer is None:
            raise HelperDied(f"{what}: its helper (pid {helper.pid}) was killed or crashed")
        if not call.answer.ok:
            raise LaneError(call.answer.name)
        return call.answer.name

    def _current(self, kind: str = _CALLS) -> _Helper:
        with self._guard:
            helper = self._helpers.get(kind)
            if helper is None or helper.useless:
                helper = self._helpers[kind] = _Helper(*self._arguments)
            return helper

    def _send(
        self, action: str, pid: int, argument: str, kind: str = _CALLS
    ) -> tuple[_Helper, _Call]:
        """A helper may be given up, or die, between being picked and getting the call: then a
        fresh one gets it."""
        for _ in range(2):
            helper = self._current(kind)
            helper.wait_until_ready()
            call = helper.send(action, pid, argument)
            if call is not None:
                return helper, call
        raise HelperDied(
            f"pid {pid}: the CUDA helper (pid {helper.pid}) died again before the driver's "
            f"{action} call"
        )

    def _retire(self, helper: _Helper, call: _Call) -> None:
        """No further call goes to a helper with a hung one; others under way in it may end."""
        with self._guard:
            if self._helpers.get(_CALLS) is helper:
                del self._helpers[_CALLS]
        helper.abandon(call)


class _Call:
    __slots__ = ("answer", "came_back")

    def __init__(self) -> None:
        self.came_back = threading.Event()
        self.answer: Answer | None = None  # still None once it came back: the helper died


class _Helper:
    """One helper process, its socket, and the thread that reads its answers and reaps it."""

    def __init__(self, python: str, library: str, nvidia_command: str) -> None:
        self._guard = threading.Lock()
        self._calls: dict[int, _Call] = {}
        self._last_number = 0
        self._ready = threading.Event()
        self._library: Library | None = None
        self._why_none = ""  # no libcuda
        self._why_broken = ""
        self.useless = False  # died, or is given up because a call hangs in it
        self._ended = False
        self.gone = threading.Event()
        """The process has ended: none of its threads does anything any more."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self.pid = _spawn(python, [_ROOT, library, nvidia_command], theirs)
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            self._socket.close()
            raise HelperDied(f"the CUDA helper cannot be started: {python}: {error}") from error
        finally:
            theirs.close()
        threading.Thread(target=self._read, name="cuda-helper", daemon=True).start()

    def wait_until_ready(self) -> Library:
        if not self._ready.wait(START_SECONDS):
            self.kill()
            raise CallAbandoned(
                f"the CUDA helper (pid {self.pid}) did not load libcuda "
                f"within {START_SECONDS:.0f} s"
            )
        if self._why_none:
            raise LibraryError(self._why_none)
        if self._library is None:
            raise HelperDied(f"the CUDA helper (pid {self.pid}) did not start: {self._why_broken}")
        return self._library

    def send(self, action: str, pid: int, argument: str) -> _Call | None:
        """Sends a call off; None where this helper takes none any more."""
        call = _Call()
        with self._guard:
            if self.useless:
                return None
            self._last_number += 1
            message = f"{self._last_number}\t{action}\t{pid}\t{argument}".encode()
            try:
                self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            except OSError:
                self.useless = True
                return None
            self._calls[self._last_number] = call
        return call

    def abandon(self, call: _Call) -> None:
        with self._guard:
            self.useless = True
            self._calls = {number: c for number, c in self._calls.items() if c is not call}
            done = not self._calls
        if done:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, and our end of the socket shut so that the reader ends even where the process
        cannot die yet. Never waits."""
        import signal

        with self._guard:
            if self._ended:
                return
            self.useless = True
            try:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it went by itself

    def _read(self) -> None:
        try:
            while message := self._socket.recv(_LARGEST_MESSAGE):
                self._take(message.decode().split("\t"))
        except OSError:
            pass  # reset by a killed helper: the same as its end
        self._end()

    def _take(self, fields: list[str]) -> None:
        if fields[0] == "ready":
            _, path, version, missing = fields
            self._library = Library(path, int(version), tuple(filter(None, missing.split(","))))
            self._ready.set()
        elif fields[0] == "none":
            self._why_none = fields[1]
        elif fields[0] == "broken":
            self._why_broken = fields[1]
        else:
            number, code, name, value, started, ended = fields
            with self._guard:
                call = self._calls.pop(int(number), None)
                done = self.useless and not self._calls
            if call is not None:
                call.answer = Answer(int(code), name, int(value), float(started), float(ended))
                call.came_back.set()
            if done:
                self.kill()

    def _end(self) -> None:
        with self._guard:
            self.useless = self._ended = True
            calls, self._calls = self._calls, {}
            self._socket.close()
            os.close(self._pidfd)
        for call in calls.values():
            call.came_back.set()
        # A process that cannot die yet holds this thread only.
        try:
            _, status = os.waitpid(self.pid, 0)
            ending = f"exit status {os.waitstatus_to_exitcode(status)}"
        except ChildProcessError:  # somebody else reaped it
            ending = "unknown exit status"
        self._why_broken = self._why_broken or ending
        self.gone.set()
        self._ready.set()


def _spawn(python: str, arguments: list[str], theirs: socket.socket) -> int:
    devnull = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return os.posix_spawn(
            python,
            [python, "-I", "-c", _PROGRAM, *arguments],
            os.environ,
            file_actions=[  # in this order: `devnull` may itself be 3
                *((os.POSIX_SPAWN_DUP2, devnull, fd) for fd in (0, 1, 2)),
                (os.POSIX_SPAWN_DUP2, theirs.fileno(), 3),
            ],
            setsid=True,  # a signal to the shim's group must not cut a driver call short
        )
    finally:
        os.close(devnull)
