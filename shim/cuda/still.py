"""System calls made in the name of processes of a frozen container. For the helper process only.

A frozen process makes no call. So its control group is thawed, with every thread in it stopped by
ptrace beforehand: of the container's own program nothing runs meanwhile, as when CRIU dumps. Should
the helper be killed in between, the kernel lets the threads go and the container runs: whoever had
it frozen has to look.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from shim import cgroup
from shim.criu_bridge import freezer
from shim.cuda.ptrace import TraceError, let_go, seize, wait_for_stop

_SECONDS = 10.0
_DEAD = "ZX"


@contextmanager
def held(group: str) -> Iterator[None]:
    """The frozen control group `group`, thawed, with no thread running: `inject.calling` works on
    each. Frozen again afterwards. Raises TraceError."""
    if freezer.state(group) != freezer.FROZEN:
        raise TraceError(f"{group} is not frozen")
    seized: dict[int, int] = {}
    try:
        for pid in cgroup.processes(group):
            for tid in living_threads(pid):
                seize(tid)
                seized[tid] = 0
        if not freezer.put_back(group, freezer.THAWED, _SECONDS):
            raise TraceError(f"{group} was not thawed within {_SECONDS:.0f} s")
        for tid in seized:
            seized[tid] = wait_for_stop(tid)
        yield
    finally:
        # Asked for before anything is let go: then nothing gets as far as its own next step.
        freezer.ask(group, freezer.FROZEN)
        for tid, signal_due in seized.items():
            let_go(tid, signal_due)
        if not freezer.put_back(group, freezer.FROZEN, _SECONDS):
            raise TraceError(f"{group} was not frozen again within {_SECONDS:.0f} s")


def living_threads(pid: int) -> list[int]:
    """Of a process, by their ids: its first may have ended before the others."""
    found = []
    for name in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{name}/stat", encoding="utf-8", errors="replace") as file:
            state = file.read().rpartition(")")[2].split()[0]
        if state not in _DEAD:
            found.append(int(name))
    return found
