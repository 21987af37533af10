"""How a request gets to CRIU: a private `criu swrk` process, or a running `criu service`.

Both give a `Connection`: SEQPACKET messages in and out, a way to see the end of CRIU coming, and
a way to kill it. Nothing here knows what a message means. CRIU must outlive the thread that
started it and must not be hit by signals to the shim's process group, so it gets a session of
its own and no parent-death signal; and it must never find the shim's log on its stderr.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

# Answers are small, but cr_errmsg has no limit of its own.
_MESSAGE = 1 << 20

_SIGKILL = 9
_SIGPIPE = 13

_SWRK_FD = 3


class NotStarted(OSError):
    """CRIU could not be started or connected to; nothing was asked of it."""


class Cancel:
    """Tells a running request to stop; `cancel` may be called from any thread, any number of
    times. Holds one descriptor until `close`."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True
        os.eventfd_write(self._fd, 1)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)


class Swrk:
    """A `criu swrk` process per request.

    `binary` is looked up on the PATH of `env` unless it has a slash; `env` is the whole
    environment (None: ours). `output` takes CRIU's stdout and stderr, before its log is open.
    """

    def __init__(
        self, binary: str = "criu", env: dict[str, str] | None = None, output: str = os.devnull
    ) -> None:
        self.binary = binary
        self.env = env
        self.output = output

    def open(self) -> Connection:
        """Start CRIU. Raises NotStarted."""
        env = dict(os.environ) if self.env is None else self.env
        path = _which(self.binary, env.get("PATH", os.defpath))
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC
        )
        try:
            pid = self._spawn(path, env, theirs)
        except OSError as err:
            ours.close()
            raise NotStarted(err.errno, f"cannot start {path}: {err.strerror}") from err
        finally:
            theirs.close()
        return Connection(ours, pid, ours=True)

    def _spawn(self, path: str, env: dict[str, str], theirs: socket.socket) -> int:
        append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        actions = [
            # First: the copies below may land on the number the socket has now.
            (os.POSIX_SPAWN_DUP2, theirs.fileno(), _SWRK_FD),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, self.output, append, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        # SIGXFSZ stays ignored, as Python has it: `starve` counts on that.
        return os.posix_spawn(
            path,
            [self.binary, "swrk", str(_SWRK_FD)],
            env,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=(_SIGPIPE,),
        )

    def __str__(self) -> str:
        return f"{self.binary} swrk"


class Service:
    """A running `criu service --address PATH`, which forks a worker for each connection.

    CRIU opens our descriptors through /proc/PID/fd, so the service must live in our pid
    namespace. Its environment and plugin directory are its own affair.
    """

    env: dict[str, str] | None = None

    def __init__(self, path: str) -> None:
        self.path = path

    def open(self) -> Connection:
        """Connect. Raises NotStarted."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self.path)
        except OSError as err:
            sock.close()
            raise NotStarted(
                err.errno, f"cannot connect to the CRIU service at {self.path}: {err.strerror}"
            ) from err
        ids = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        service_pid = struct.unpack("3i", ids)[0]
        return Connection(sock, service_pid, ours=False)

    def __str__(self) -> str:
        return f"criu service at {self.path}"


class Connection:
    """One conversation with CRIU. `pid` is the swrk process, which is `ours`, or the service's
    listener, which is not."""

    def __init__(self, sock: socket.socket, pid: int, *, ours: bool) -> None:
        self._sock = sock
        self.pid = pid
        self.ours = ours
        self._pidfd = os.pidfd_open(pid) if ours else -1
        self._status: int | None = None

    def send(self, data: bytes) -> None:
        """Send one message. Raises OSError where CRIU has gone."""
        self._sock.send(data)

    def receive(self, deadline: float | None, cancel: Cancel | None) -> bytes | None:
        """The next message; b"" when CRIU has gone; None when `deadline` (time.monotonic) has
        passed or `cancel` was called."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if self.ours:
            # A child of a killed CRIU may hold the other end open: EOF alone is no proof.
            poll.register(self._pidfd, select.POLLIN)
        if cancel is not None:
            poll.register(cancel, select.POLLIN)
        wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = {fd for fd, _ in poll.poll(wait)}
        if self._sock.fileno() in ready:
            try:
                return self._sock.recv(_MESSAGE)
            except ConnectionResetError:
                return b""
        if self.ours and self._pidfd in ready:
            return b""
        return None

    def starve(self) -> None:
        """Make CRIU's next write to a file fail, so that it gives up and undoes everything
        itself (cures the processes, unlocks network and devices, restores the freezer).

        Only our own swrk: it ignores SIGXFSZ as we do, and so sees EFBIG instead.
        """
        if self.ours and self._status is None:
            import resource

            with contextlib.suppress(OSError):
                resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (0, 0))

    def kill(self, dumped_pid: int) -> None:
        """SIGKILL CRIU and what it started: our swrk's whole session, or the worker of the
        service that dumps `dumped_pid`."""
        if not self.ours:
            _kill_worker(self.pid, dumped_pid)
        elif self._status is None:
            # Not reaped yet, so the number is still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, _SIGKILL)

    def wait(self, timeout_s: float) -> bool:
        """Reap our swrk process; True when it has ended. A service is not ours to wait for:
        there the end of the connection is all there is, and True is the answer."""
        if not self.ours or self._status is not None:
            return True
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
        # A CRIU that was killed may leave a child that sleeps for ever (4.2 util.c:
        # fork_and_ptrace_attach), with the images open.
        self.kill(0)
        try:
            self._status = os.waitpid(self.pid, os.WNOHANG)[1]
        except ChildProcessError:
            # A reaper of orphans in this process was quicker; how it ended is lost.
            self._status = 0
        return True

    def ending(self) -> str:
        """How CRIU ended, for a message; only after `wait` said it did."""
        if not self.ours:
            return "its worker ended the connection"
        code = os.waitstatus_to_exitcode(self._status or 0)
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """Close the socket, at which CRIU ends by itself, and reap it; kill it if it does not."""
        self._sock.close()
        if self.ours and not self.wait(5):
            self.kill(self.pid)
            self.wait(5)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def dumps(criu: int, pid: int) -> bool:
    """Whether process `criu` is a CRIU, of whatever name, that dumps `pid`: it then calls itself
    "criu: dump --rpc -t PID" (cr-service.c: setproctitle), and 4.1 adds "-D DIRECTORY"."""
    try:
        with open(f"/proc/{criu}/cmdline", "rb") as file:
            words = file.read().replace(b"\0", b" ").split()
    except OSError:
        return False
    return words[:5] == [b"criu:", b"dump", b"--rpc", b"-t", b"%d" % pid]


def _kill_worker(service_pid: int, dumped_pid: int) -> None:
    try:
        with open(f"/proc/{service_pid}/task/{service_pid}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
    except OSError:
        return
    for pid in children:
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        try:
            if dumps(pid, dumped_pid):
                os.kill(pid, _SIGKILL)
                ended = select.poll()
                ended.register(pidfd, select.POLLIN)
                ended.poll(5000)
        except OSError:
            continue
        finally:
            os.close(pidfd)


def _which(binary: str, path: str) -> str:
    if "/" in binary:
        return binary
    for directory in path.split(os.pathsep):
        candidate = os.path.join(directory, binary)
        if os.access(candidate, os.X_OK) and not os.path.isdir(candidate):
            return candidate
    raise NotStarted(2, f"no executable {binary} on PATH {path}")
