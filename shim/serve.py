"""The daemon: one per group of tasks, between containerd and the stock shim.

It passes frames through and hands the few intercepted calls to `tasks`. It ends when the
inner shim ends, since it is nothing without it, and the inner shim ends with it; nothing is
left behind. Nothing slow may run in the proxy's loop: containerd gives up a shim that does not
answer Connect in 5 s, and a shim given up is a container killed.
"""

from __future__ import annotations

# As `_socket`, it does what its front does, whose import costs more than all of ours.
import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
import threading

from shim import ending, group, log, messages
from shim.tasks import Tasks
from shim.ttrpc import Client, Proxy, StatusError, connect


def run(listening: int, home: str, namespace: str, inner_address: str) -> int:
    """Serves until the inner shim is gone; returns the exit status.

    `listening` is the descriptor of our socket, `home` the group's run directory,
    `inner_address` where the stock shim listens.
    """
    listener = _socket.socket(fileno=listening)
    address = listener.getsockname()
    log.open_fifo(os.path.join(home, "log"))
    os.chdir("/")
    _rank_for_oom()
    sys.setswitchinterval(0.0005)  # seconds a computing handler may hold up the proxy
    try:
        inner = Client(connect(inner_address))
        tasks = Tasks(inner, namespace, home)
        proxy = Proxy(
            listener, lambda: connect(inner_address), tasks.handler_for, tasks.connection_closed
        )
        _signal.signal(_signal.SIGTERM, lambda *_: proxy.stop())
        _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
        threading.Thread(target=_follow, args=(inner, home, proxy), daemon=True).start()
        proxy.run()
        tasks.settle()
    except BaseException as error:
        log.error("the shim's daemon failed; its tasks end with it", error=repr(error))
        return 1
    finally:
        _leave(home, address)
    return 0


def _follow(inner: Client, home: str, proxy: Proxy) -> None:
    """Beside the proxy, which is waited for: an inner shim that has just started takes its time."""
    try:
        _record_inner(home, inner)
        inner.wait_closed()
    finally:
        proxy.stop()


def _record_inner(home: str, inner: Client) -> None:
    """Learns the inner shim's pid, for a `delete` that must end it without us."""
    for service in reversed(messages.SERVICES):
        try:
            reply = inner.call(service, "Connect", b"", timeout=5)
        except StatusError:
            continue
        group.record_process(home, "inner", messages.ConnectResponse.decode(reply).shim_pid)
        return


def _rank_for_oom() -> None:
    """The kernel may take us one step after containerd, as the stock shims rank themselves
    (1.6 runtime/v2/shim/util_unix.go: AdjustOOMScore)."""
    try:
        with open("/proc/self/oom_score_adj", "r+", encoding="ascii") as file:
            score = min(int(file.read()) + 1, 1000)
            file.seek(0)
            file.write(str(score))
    except OSError:
        pass  # not permitted in a restricted user namespace; ranking is a courtesy


def _leave(home: str, address: str) -> None:
    """Ends the inner shim if it lives on, with what tasks it has: a `delete` that comes now finds
    us alive and leaves that to us. Then removes the socket and the group's records, unless a
    `delete` was quicker and the group has begun again."""
    lock = group.lock(home)
    if group.living_process(home, "outer") in (0, os.getpid()):
        ending.end(home)
        group.unlink(address)
    os.close(lock)
