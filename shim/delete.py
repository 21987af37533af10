"""`delete`: containerd's way to be rid of a task, called at every task's normal end and when
a shim has died; killed after 5 s (2.1 core/runtime/v2/shim.go), so cheap and idempotent.

The stock shim's own `delete` does the work, in this very process. Only when our daemon was
killed is there something to do first: the inner shim lives on, and nobody else ends it.
"""

from __future__ import annotations

import os

from shim import bundle, ending, group, inner, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.invocation import Invocation


def run(call: Invocation) -> int:
    here = os.getcwd()
    address = bundle.read_address(here)
    if address.startswith(f"unix://{places.SOCKETS}/"):
        home = places.group_directory(address)
        if os.path.isdir(home) and not group.living_process(home, "outer"):
            lock = group.lock(home)
            if not _listening(places.socket_of(address)):  # the group has not begun again
                ending.end(home)
                group.unlink(places.socket_of(address))
            os.close(lock)
    return inner.exec_delete(call.argv, call.get("publish-binary"))


def _listening(path: str) -> bool:
    import socket  # costs more than all else that a task's normal end needs

    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0.1)
        # EAGAIN is a full backlog: somebody is there
        return probe.connect_ex(path) in (0, 11)
