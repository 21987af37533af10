"""The end of a group whose daemon is going or has gone while its inner shim lives on.

containerd holds every task of such a group for dead and can no longer reach it, so they are ended
through the inner shim, whose exit events containerd still hears; then the inner shim ends, then
its sockets and the records go. The caller holds the group's lock.
"""

from __future__ import annotations

import os

from shim import bundle, group, journal, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BUDGET = 2.0
"""Seconds for ending the tasks. containerd gives a `delete` 5, and the stock delete follows."""

_GRACE = 1.0
"""Seconds for the inner shim to be gone once it has no tasks: it may have events to send."""


def end(home: str) -> None:
    """Ends what there still is of the group; for one whose inner shim has ended, or is about to,
    that is its records only."""
    interrupted = journal.read(home)
    for entry in interrupted.values():
        _end_criu(entry.get("criu"))
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
    for id, entry in interrupted.items():
        log.warning(f"a container ended with its shim's daemon, {_in_the_middle_of(entry)}", id=id)
    named = [entry.get(kind) for entry in interrupted.values() for kind in ("plain", "draft")]
    _remove_drafts([str(path) for path in named if path])


def _in_the_middle_of(entry: dict[str, Any]) -> str:
    """What was under way, and what is left of it."""
    phase = str(entry["phase"])
    if entry.get("images"):
        return f"{phase}; the checkpoint {entry['images']} is as it was: start it again"
    if entry.get("checkpoint"):
        return f"{phase}; its checkpoint {entry['checkpoint']} is whole: it can be restored"
    if phase == journal.PUBLISHING:
        return f"{phase}; if there is a checkpoint {entry['final']}, it is whole"
    if entry.get("draft"):
        return f"{phase}; of what it had written to {entry['draft']} nothing is kept"
    return f"{phase}; no checkpoint was being written"


def _end_criu(criu: object) -> None:
    """Kills the CRIU that was the dead daemon's child, and what it has started, as whatever it is
    waiting for: it might hold processes that are not the container's first, or be about to."""
    if not isinstance(criu, list) or group.start_time(criu[0]) != criu[1]:
        return
    try:
        os.killpg(criu[0], 9)  # it leads a session of its own: criu_bridge/transport.py
    except OSError:
        pass  # it has just ended


def _remove_drafts(drafts: list[str]) -> None:
    """Beside this process, which containerd gives 5 s: a draft may have a hundred gigabytes, and
    lie where nothing answers."""
    if not drafts or os.fork():
        return
    try:
        os.setsid()
        # containerd reads a `delete` to the end of its output, and others wait for the lock.
        os.closerange(0, 1 << 16)
        for _ in range(3):
            os.open(os.devnull, os.O_RDWR)
        from shim import checkpoint_dir

        for draft in drafts:
            checkpoint_dir.remove_draft(draft)
    finally:
        os._exit(0)


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
