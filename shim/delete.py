"""`delete`: containerd's way to be rid of a task, called at every task's normal end and when
a shim has died; killed after 5 s (2.1 core/runtime/v2/shim.go), so cheap and idempotent.

The stock shim's own `delete` does the work, in this very process. Only when our daemon died
while the inner shim lives on is there something to do first: containerd now holds every task
of the group for dead and can no longer reach it, so the group is ended through the inner
shim, whose exit events containerd still hears.
"""

from __future__ import annotations

import os

from shim import bundle, group, inner, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.invocation import Invocation

_BUDGET = 2.5
"""Seconds for ending a group, out of containerd's 5; the stock delete needs the rest."""


def run(call: Invocation) -> int:
    here = os.getcwd()
    address = bundle.read_address(here)
    if address.startswith(f"unix://{places.SOCKETS}/"):
        home = places.group_directory(address)
        if os.path.isdir(home) and not group.living_process(home, "outer"):
            lock = group.lock(home)
            if not _listening(places.socket_of(address)):  # the group has not begun again
                _end_group(home)
                group.unlink(places.socket_of(address))
            os.close(lock)
    return inner.exec_delete(call.argv, call.get("publish-binary"))


def _listening(path: str) -> bool:
    import socket  # costs more than all else that a task's normal end needs

    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.1)
        # EAGAIN is a full backlog: somebody is there
        return probe.connect_ex(path) in (0, 11)


def _end_group(home: str) -> None:
    """Ends what dumps a task of the group, every task, then the inner shim, then the records."""
    for folder in group.tasks(home).values():
        _end_dump(bundle.init_pid(folder))
    pid = group.living_process(home, "inner")
    if pid:
        try:
            _end_tasks(home)
        except (OSError, ValueError):
            pass  # an inner that does not answer is killed all the same
        try:
            if group.living_process(home, "inner") == pid:
                os.kill(pid, 9)
        except ProcessLookupError:
            pass
    inner_address = bundle.address_in(group.answer(home))
    if inner_address:
        group.unlink(places.socket_of(inner_address))
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
    import time

    from shim import messages
    from shim.protowire import Message
    from shim.ttrpc import Client, StatusError, connect

    answer = group.answer(home)
    service = messages.SERVICES[1 if '"version":3' in answer.replace(" ", "") else 0]
    deadline = time.monotonic() + _BUDGET
    client = Client(connect(bundle.address_in(answer)))

    def ask(method: str, request: Message) -> None:
        try:
            client.call(
                service,
                method,
                request.encode(),
                timeout=max(0.1, deadline - time.monotonic()),
            )
        except StatusError:
            pass  # gone already, or not to be had: the stock delete follows

    ids = list(group.tasks(home))
    for container_id in ids:
        ask("Kill", messages.KillRequest(id=container_id, signal=9, all=True))
    for container_id in ids:
        ask("Delete", messages.ExecRequest(id=container_id))
    ask("Shutdown", messages.ShutdownRequest(now=True))
    client.close()
