"""Requests to CRIU from the first byte to the last: version, features, dump.

A dump answers every notification, keeps to a deadline, can be cancelled, and always ends: with
CRIU's own answer, or with CRIU killed and the container's freezer put back. It must never leave
a CRIU behind, and never take a dump for good that CRIU did not call good.
"""

from __future__ import annotations

import contextlib
import os
import time

from shim.criu_bridge import freezer, network, rpc
from shim.criu_bridge.errors import CriuError, explain, first_error, read_log
from shim.criu_bridge.transport import Cancel, Connection, NotStarted, Service, Swrk
from shim.protowire import DecodeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    OnNotify = Callable[[str], bool]
    OnStart = Callable[[int], None]

LOG_NAME = "dump.log"

# A query is answered by CRIU alone, with no container involved.
_QUERY_TIMEOUT_S = 30.0

_CANCELLED = "the dump was cancelled"

# What CRIU gets to undo a dump that was stopped, before it is killed.
GRACE_S = 10.0

# How often a dump is held against the process dumped: a killed init waits for its threads, which
# CRIU traces, and CRIU waits for it, for ever.
_LOOK_S = 0.5

# runc waits as long for a freeze (cgroups/fs2/freezer.go).
_FREEZE_TIMEOUT_S = 10.0

# How long killed CRIU's code may need to leave the processes again.
_CURE_TIMEOUT_S = 5.0


class DumpResult:
    """A good dump. `seconds` is from the request to CRIU's answer; `notifications` are (name,
    seconds after the request) in the order they came; `log_path` is CRIU's log."""

    __slots__ = ("log_path", "notifications", "seconds")

    def __init__(
        self, seconds: float, notifications: list[tuple[str, float]], log_path: str
    ) -> None:
        self.seconds = seconds
        self.notifications = notifications
        self.log_path = log_path


def version(criu: Swrk | Service) -> tuple[int, int, int]:
    """CRIU's version, (4, 1, 1). Raises CriuError."""
    answer = _query(criu, rpc.CriuReq(type=rpc.VERSION)).version
    if answer is None:
        raise CriuError(f"{criu} answered a version request without a version")
    return answer.major_number or 0, answer.minor_number or 0, answer.sublevel or 0


def check_features(criu: Swrk | Service) -> rpc.CriuFeatures:
    """Which of CRIU's optional features this kernel has. Raises CriuError."""
    wanted = rpc.CriuFeatures(mem_track=True, lazy_pages=True, pidfd_store=True)
    answer = _query(criu, rpc.CriuReq(type=rpc.FEATURE_CHECK, features=wanted)).features
    if answer is None:
        raise CriuError(f"{criu} answered a feature request without features")
    return answer


def dump(
    criu: Swrk | Service,
    opts: rpc.CriuOpts,
    images_dir: str,
    work_dir: str,
    *,
    on_start: OnStart | None = None,
    on_notify: OnNotify | None = None,
    deadline_s: float | None = None,
    cancel: Cancel | None = None,
) -> DumpResult:
    """Dump the tree of `opts.pid` into `images_dir`, CRIU's log and statistics into `work_dir`.

    Both directories must exist. `opts` comes from `request.dump_options`; the descriptors and
    the log's name are filled in here. `on_start(pid)` is called before anything is asked of a
    CRIU that we have started; it leads a session of its own. `on_notify(name)` is called for each
    notification, on this thread, with CRIU waiting; False or an exception makes CRIU undo the dump.
    After `deadline_s` seconds, or `cancel`, CRIU is made to undo the dump, and killed if it does
    not.
    A `cancel` after "post-dump" was answered comes too late: everything is written then.

    Raises CriuError; then the images are worthless and the processes live on, frozen if they
    were frozen before.
    """
    pid = opts.pid or 0
    log_path = os.path.join(work_dir, LOG_NAME)
    opts.log_file = LOG_NAME
    before = _Before(opts.freeze_cgroup)
    _forget(log_path)
    # CRIU opens both through /proc/<our pid>/fd, so they stay open until it has answered.
    images_fd = os.open(images_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        work_fd = os.open(work_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            opts.images_dir_fd = images_fd
            opts.work_dir_fd = work_fd
            conversation = _Conversation(criu, opts, on_start, on_notify, deadline_s, cancel)
            answer = conversation.run()
        finally:
            os.close(work_fd)
    finally:
        os.close(images_fd)
    if answer is not None and answer.success and answer.type == rpc.DUMP:
        return DumpResult(conversation.seconds, conversation.notifications, log_path)
    refrozen = before.put_freezer_back(pid)
    if answer is not None:
        raise conversation.failure(answer, log_path, refrozen)
    # CRIU undoes what it did whenever it can still answer; this one could not.
    unlocked = network.unlock(pid, criu.env)
    raise conversation.failure(answer, log_path, refrozen, unlocked)


class _Conversation:
    """One DUMP request with everything that may go on until its answer."""

    def __init__(
        self,
        criu: Swrk | Service,
        opts: rpc.CriuOpts,
        on_start: OnStart | None,
        on_notify: OnNotify | None,
        deadline_s: float | None,
        cancel: Cancel | None,
    ) -> None:
        self._criu = criu
        self._opts = opts
        self._pid = opts.pid or 0
        self._on_start = on_start
        self._on_notify = on_notify
        self._deadline_s = deadline_s
        self._cancel = cancel
        self._start = time.monotonic()
        self.notifications: list[tuple[str, float]] = []
        self.seconds = 0.0
        self.written = False  # CRIU has flushed the images and was told to go on
        self.stopped: str | None = None  # why we stopped CRIU, for the message
        self.killed = False
        self.ending = ""  # how CRIU ended without an answer
        self.callback_error: Exception | None = None
        self.refused: str | None = None  # the notification on_notify said no to

    def run(self) -> rpc.CriuResp | None:
        """CRIU's final answer, or None where it ended without one."""
        try:
            connection = self._criu.open()
        except NotStarted as err:
            raise CriuError(f"cannot dump pid {self._pid}: {err.strerror}") from err
        with connection:
            if self._on_start and connection.ours:
                self._on_start(connection.pid)
            try:
                connection.send(rpc.CriuReq(type=rpc.DUMP, opts=self._opts).encode())
            except OSError:
                answer = None
            else:
                answer = self._until_answer(connection)
            self.seconds = time.monotonic() - self._start
            if answer is None:
                connection.wait(_CURE_TIMEOUT_S)
                self.ending = connection.ending()
        return answer

    def _until_answer(self, connection: Connection) -> rpc.CriuResp | None:
        limit = None if self._deadline_s is None else self._start + self._deadline_s
        while True:
            look = time.monotonic() + _LOOK_S
            wake = look if limit is None else min(limit, look)
            deaf = self.stopped or self.written
            data = connection.receive(wake, None if deaf else self._cancel)
            if data == b"":
                return None
            if data is None:
                expired = limit is not None and time.monotonic() >= limit
                if not self.written and _ending(self._pid):
                    self.stopped = "the container ended during the dump"
                    connection.kill(self._pid)
                    return None
                if expired and self.stopped:
                    self.killed = True
                    connection.kill(self._pid)
                    return None
                if expired or (self._cancelled() and not self.stopped):
                    late = f"the deadline of {self._deadline_s} s passed"
                    self._stop(connection, _CANCELLED if self._cancelled() else late)
                    limit = time.monotonic() + GRACE_S
                continue
            try:
                answer = rpc.CriuResp.decode(data)
            except DecodeError as err:
                self.stopped = f"its answer was not understood ({err})"
                connection.kill(self._pid)
                return None
            if answer.type != rpc.NOTIFY:
                return answer
            self._answer_notification(connection, answer)
            if self._cancelled() and not self.stopped:
                self._stop(connection, _CANCELLED)
                limit = time.monotonic() + GRACE_S

    def _cancelled(self) -> bool:
        return self._cancel is not None and self._cancel.cancelled and not self.written

    def _stop(self, connection: Connection, why: str) -> None:
        self.stopped = why
        if not self.written:
            connection.starve()

    def _answer_notification(self, connection: Connection, answer: rpc.CriuResp) -> None:
        name = (answer.notify.script if answer.notify else None) or ""
        self.notifications.append((name, time.monotonic() - self._start))
        success = not self.stopped and not self._cancelled() and self._consent(name)
        # The callback may have taken its time.
        success = success and not self._cancelled()
        self.written = self.written or (success and name == "post-dump")
        reply = rpc.CriuReq(type=rpc.NOTIFY, notify_success=success)
        # Where CRIU has gone the next receive says so.
        with contextlib.suppress(OSError):
            connection.send(reply.encode())

    def _consent(self, name: str) -> bool:
        if self._on_notify is None:
            return True
        try:
            consent = self._on_notify(name)
        except Exception as err:
            self.callback_error = err
            consent = False
        if not consent:
            self.refused = name
        return consent

    def failure(
        self,
        answer: rpc.CriuResp | None,
        log_path: str,
        refrozen: bool | None,
        unlocked: bool | None = None,
    ) -> CriuError:
        """The error of a conversation that ended in anything but a good dump."""
        log = read_log(log_path)
        line = first_error(log)
        errno = 0
        if answer is not None:
            errno = answer.cr_errno or 0
            if line is None and answer.cr_errmsg:
                line = first_error(answer.cr_errmsg.decode("utf-8", "replace"))
        text = f"{self._criu} could not dump pid {self._pid}: {self._reason(answer, log, line)}"
        if refrozen is False:
            text += "; its freezer could not be put back to what it was before"
        if unlocked is False:
            text += (
                "; it left the container's network cut off: remove the chain CRIU from the filter "
                "tables in its network namespace"
            )
        if answer is None and self._opts.tcp_established:
            # CRIU had them in repair mode (criu/sk-tcp.c), where any call on them fails.
            text += "; TCP connections that were open may have broken"
        if log:
            text += f"; log: {log_path}"
        error = CriuError(
            text,
            log_path=log_path if log else None,
            first_error=line,
            errno=errno,
            died=answer is None,
            refrozen=refrozen,
        )
        error.__cause__ = self.callback_error
        return error

    def _reason(self, answer: rpc.CriuResp | None, log: str, line: str | None) -> str:
        """Why it failed. What we did to CRIU comes before what its log says of that."""
        if self.stopped:
            killed = f", CRIU did not stop within {GRACE_S:g} s and was killed"
            return self.stopped + (killed if self.killed else "")
        if self.refused is not None:
            why = f": {self.callback_error}" if self.callback_error else ""
            return f"refused at {self.refused}{why}"
        parts = []
        if answer is None:
            parts.append(f"CRIU ended without an answer ({self.ending})")
        if line:
            parts.append(line)
            words = explain(log or line)
            if words:
                parts.append(words)
        elif answer is not None:
            parts.append(os.strerror(answer.cr_errno) if answer.cr_errno else "no reason given")
        return "; ".join(parts)


class _Before:
    """The freezer as it was before a dump, to go back to."""

    def __init__(self, cgroup: str | None) -> None:
        self._cgroup = cgroup
        self._state = freezer.state(cgroup) if cgroup else None

    def put_freezer_back(self, pid: int) -> bool | None:
        """The freezer as it was. A CRIU that failed by itself has done so already; one that was
        killed has not, and its code may still be in the processes, where it removes itself
        only while they run. None: no freezer.

        Thawed where the dumped process `pid` has ended: `runc kill` thaws what it kills, CRIU
        freezes it again, and runc deletes no frozen container (runc 1.1: state_linux.go)."""
        if self._cgroup is None or self._state is None:
            return None
        thaw = self._state == freezer.THAWED or _ending(pid)
        wanted = freezer.THAWED if thaw else freezer.FROZEN
        if freezer.state(self._cgroup) == wanted:
            return True
        if wanted == freezer.FROZEN:
            _wait_cured(self._cgroup)
        return freezer.put_back(self._cgroup, wanted, _FREEZE_TIMEOUT_S)


def _query(criu: Swrk | Service, request: rpc.CriuReq) -> rpc.CriuResp:
    """One request that has one answer and touches no container."""
    try:
        connection = criu.open()
    except NotStarted as err:
        raise CriuError(f"cannot ask CRIU: {err.strerror}") from err
    with connection:
        try:
            connection.send(request.encode())
            data = connection.receive(time.monotonic() + _QUERY_TIMEOUT_S, None)
        except OSError:
            data = b""  # it has gone before it was asked
        if data is None:
            connection.kill(0)
            raise CriuError(f"{criu} did not answer within {_QUERY_TIMEOUT_S:g} s", died=True)
        if not data:
            connection.wait(_CURE_TIMEOUT_S)
            raise CriuError(f"{criu} ended without an answer ({connection.ending()})", died=True)
    try:
        answer = rpc.CriuResp.decode(data)
    except DecodeError as err:
        raise CriuError(f"{criu} sent an answer that is not understood: {err}") from err
    if not answer.success:
        reason = (answer.cr_errmsg or b"").decode("utf-8", "replace").strip()
        raise CriuError(
            f"{criu} refused: {reason or os.strerror(answer.cr_errno or 0)}",
            errno=answer.cr_errno or 0,
        )
    return answer


def _wait_cured(cgroup: str) -> None:
    """Wait until no process of the cgroup runs CRIU's code any more."""
    deadline = time.monotonic() + _CURE_TIMEOUT_S
    while time.monotonic() < deadline:
        if not any(_infected(pid) for pid in _processes(cgroup)):
            return
        time.sleep(0.01)


def _processes(cgroup: str) -> list[int]:
    """The processes of a cgroup and of those below it."""
    pids = []
    for directory, _, _ in os.walk(cgroup):
        try:
            with open(os.path.join(directory, "cgroup.procs"), encoding="ascii") as file:
                pids += [int(line) for line in file]
        except OSError:
            continue
    return pids


def _ending(pid: int) -> bool:
    """Whether a process is gone or on its way out (proc(5): field 9, PF_EXITING)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return True
    return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & 0x4)


def _infected(pid: int) -> bool:
    """Whether a thread of the process is within CRIU's code. compel maps that from a memory
    file of this name; the mapping stays when its threads have left, so their place decides."""
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as file:
            ranges = [line.split(" ", 1)[0].split("-") for line in file if "/memfd:CRIUMFD" in line]
        if not ranges:
            return False
        for tid in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as file:
                # Its last word is the instruction pointer, unless the thread is "running".
                place = file.read().split()[-1]
            if place == "running" or any(
                int(start, 16) <= int(place, 16) < int(end, 16) for start, end in ranges
            ):
                return True
    except (OSError, ValueError, IndexError):
        pass  # it has ended
    return False


def _forget(path: str) -> None:
    """A log of an earlier attempt must not explain this one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
