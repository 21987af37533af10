"""The end of a group whose daemon is going or has gone while its inner shim lives on.

containerd holds every task of such a group for dead and can no longer reach it, so they are ended
through the inner shim, whose exit events containerd still hears; then the inner shim ends, then
its sockets and the records go. The caller holds the group's lock.
"""

from __future__ import annotations

import os

from shim import bundle, group

_BUDGET = 2.0
"""Seconds for ending the tasks. containerd gives a `delete` 5, and the stock delete follows."""

_GRACE = 1.0
"""Seconds for the inner shim to be gone once it has no tasks: it may have events to send."""


def end(home: str) -> None:
    """Ends what there still is of the group; for one whose inner shim has ended, or is about to,
    that is its records only."""
    for folder in group.tasks(home).values():
        _end_dump(bundle.init_pid(folder))
    pid = group.living_process(home, "inner")
    if pid:
        try:
            _end_tasks(home)
        except (OSError, ValueError):
            pass  # one that ends listens no more, one that does not answer is killed all the same
        _end_process(pid)
    # The inner shim of containerd 2.x looks for them under other names (2.1
    # pkg/shim/util_unix.go), and one that was killed leaves them in any case.
    for socket in group.sockets(home):
        group.unlink(socket)
    group.remove(home)


def _end_dump(pid: int) -> None:
    """Kills the CRIU that has process `pid` in its hands and no shim any more: it would wait for
    ever for the end of a process that is killed under it, and that process for CRIU."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            tracer = next(int(line.split()[1]) for line in file if line.startswith(b"TracerPid:"))
        if tracer:
            from shim.criu_bridge.transport import dumps

            if dumps(tracer, pid):
                os.kill(tracer, 9)
    except OSError:
        pass  # either has ended meanwhile


def _end_tasks(home: str) -> None:
    tasks = group.tasks(home)
    removed = [path for path in tasks.values() if not os.path.isdir(path)]
    # containerd 2.1 removes the bundles of a pod whose shim has died while its containers run on,
    # and runc, which logs to the bundle, then ends none of them.
    for path in removed:
        os.makedirs(path, mode=0o711)
    try:
        _ask_for_the_end(home, list(tasks))
    finally:
        for path in removed:
            import shutil

            shutil.rmtree(path, ignore_errors=True)


def _ask_for_the_end(home: str, ids: list[str]) -> None:
    import time

    from shim import messages
    from shim.protowire import Message
    from shim.ttrpc import Client, StatusError, connect

    answer = group.answer(home)
    service = messages.SERVICES[1 if '"version":3' in answer.replace(" ", "") else 0]
    deadline = time.monotonic() + _BUDGET
    with Client(connect(bundle.address_in(answer))) as inner:

        def ask(method: str, request: Message) -> None:
            left = max(0.1, deadline - time.monotonic())
            try:
                inner.call(service, method, request.encode(), timeout=left)
            except StatusError:
                pass  # gone already, or not to be had: the stock delete follows

        for id in ids:
            ask("Kill", messages.KillRequest(id=id, signal=9, all=True))
        for id in ids:
            ask("Wait", messages.ExecRequest(id=id))
            ask("Delete", messages.ExecRequest(id=id))
        ask("Shutdown", messages.ShutdownRequest(now=True))


def _end_process(pid: int) -> None:
    import select
    import signal

    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(_GRACE * 1000):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
