"""CRIU and the CUDA helper killed, or stopped for ever, and a driver that hangs, in each phase in
which they are at work."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import (
    criu_halted,
    criu_restoring,
    criu_with_all_written,
    helper_calling,
)
from tests.e2e.gpu import configure, until
from tests.matrix.cell import IMAGES

if TYPE_CHECKING:
    from tests.matrix.cell import Cell

SLOW = "speed=200000"  # bytes/s: more than a second for the workload's 256 KiB
HANGS = {"lock": "lock=hang", "copy": "checkpoint=hang", "give-back": "restore=hang"}
WAITS = {"lock": "lock=never", "copy": SLOW, "give-back": SLOW}


@pytest.mark.parametrize("phase", ["dump", "publish"])
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_criu_in_a_checkpoint(cell: Cell, phase: str, fault: str) -> None:
    """Halted when it has the processes in its hands, and when all is written."""
    configure(cell.node, dump_timeout=5)
    cell.restart()
    client = cell.checkpoint()
    job: Any = cell.box
    criu = criu_halted(job) if phase == "dump" else criu_with_all_written(job, IMAGES)
    if fault == "killed":
        os.kill(criu, signal.SIGKILL)
    told = client.result(60)
    assert ("killed by signal 9" if fault == "killed" else "the deadline of 5") in told
    configure(cell.node)
    came = cell.dead(told) if "the container has ended" in told else cell.alive(whole=False)
    cell.came(f"CRIU {fault}", "checkpoint", phase, came)


@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_criu_in_a_restore(cell: Cell, fault: str) -> None:
    configure(cell.node, restore_timeout=5)
    cell.end_by_checkpoint()
    client = cell.restore()
    criu = cell.node.host_pid(criu_restoring(cell.node))
    os.kill(criu, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    told = client.result(60)
    configure(cell.node)
    cell.came(f"CRIU {fault}", "restore", "restore", cell.restorable(told))


@pytest.mark.parametrize("phase", ["lock", "copy", "give-back"])
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_helper_in_a_checkpoint(cell: Cell, phase: str, fault: str) -> None:
    """In the middle of a driver call; a helper that is stopped is given up at its deadline."""
    configure(cell.node, lock_timeout=1, dump_timeout=5)
    cell.restart()
    if phase != "give-back":
        cell.board.fault(WAITS[phase])
        client = cell.checkpoint()
    else:
        held = cell.held(phase)
        client = cell.checkpoint()
        held.reached()
        cell.board.fault(WAITS[phase])
        held.go_on()
    pid = cell.node.host_pid(helper_calling(cell.node))
    os.kill(pid, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    cell.board.end_faults()
    told = client.result(90)
    configure(cell.node)
    whole = phase == "give-back"
    assert told or whole
    if told and whole:
        cell.box.begin("Resume").result()
    cell.came(f"helper {fault}", "checkpoint", phase, cell.alive(whole=whole))


@pytest.mark.parametrize("phase", ["lock", "copy", "give-back"])
def test_driver_hangs_in_a_checkpoint(cell: Cell, phase: str) -> None:
    configure(cell.node, lock_timeout=1, dump_timeout=5)
    cell.restart()
    if phase != "give-back":
        cell.board.fault(HANGS[phase])
        client = cell.checkpoint()
        hung = helper_calling(cell.node)
    else:
        held = cell.held(phase)
        client = cell.checkpoint()
        held.reached()
        cell.board.fault(HANGS[phase])
        held.go_on()
        hung = helper_calling(cell.node)
    until("its end", lambda: not cell.node.path(f"/proc/{hung}").exists())
    cell.board.end_faults()
    told = client.result(90)
    assert "did not come back within" in told
    configure(cell.node)
    whole = phase == "give-back"
    if whole:
        cell.box.begin("Resume").result()
    cell.came("driver hangs", "checkpoint", phase, cell.alive(whole=whole))


@pytest.mark.parametrize("fault", ["helper killed", "helper stopped", "driver hangs"])
def test_gpu_in_a_restore(cell: Cell, fault: str) -> None:
    """While the processes get their GPU back."""
    configure(cell.node, lock_timeout=1, dump_timeout=5)
    cell.end_by_checkpoint()
    held = cell.held("restore-gpu")
    client = cell.restore()
    held.reached()
    cell.board.fault("restore=hang" if fault == "driver hangs" else SLOW)
    held.go_on()
    pid = cell.node.host_pid(helper_calling(cell.node))
    if fault != "driver hangs":
        os.kill(pid, signal.SIGKILL if fault == "helper killed" else signal.SIGSTOP)
        cell.board.end_faults()
    told = client.result(90)
    cell.board.end_faults()
    configure(cell.node)
    if told:
        came = cell.restorable(told)
    else:  # another helper has mended it
        cell.box.check()
        cell.next_works()
        came = "restored all the same"
    cell.came(fault, "restore", "restore-gpu", came)
