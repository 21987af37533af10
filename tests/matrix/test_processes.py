"""CRIU and the CUDA helper killed, or stopped for ever, and a driver that hangs, in each phase in
which they are at work."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import (
    criu_halted,
    criu_restoring,
    helper_calling,
)
from tests.e2e.gpu import configure, until
from tests.matrix.strikes import AT_ITS_LIMIT, FAULTS, needs_memory_groups, struck

if TYPE_CHECKING:
    from tests.matrix.cell import Cell

SLOW = "speed=200000"  # bytes/s: more than a second for the workload's 256 KiB
WAITS = {"lock": "lock=never", "copy": "checkpoint=hang", "give-back": "restore=hang"}
HANGS = {"lock": "lock=hang", "copy": "checkpoint=hang", "give-back": "restore=hang"}


@pytest.mark.parametrize("phase", ["dump", "publish", "let-go"])
@pytest.mark.parametrize("fault", ["killed", "stopped"])
def test_criu_in_a_checkpoint(cell: Cell, phase: str, fault: str) -> None:
    """When it has the processes in its hands, and when it waits for the shim with all written."""
    configure(cell.node, dump_timeout=5)
    cell.restart()
    signal_ = signal.SIGKILL if fault == "killed" else signal.SIGSTOP
    if phase == "dump":
        client = cell.checkpoint()
        job: Any = cell.box
        os.kill(criu_halted(job), signal_)
    else:
        held = cell.held(phase)
        client = cell.checkpoint()
        held.reached()
        for pid in cell.node.pids("criu"):
            os.kill(cell.node.host_pid(pid), signal_)
        held.go_on()
    told = client.result(60)
    assert ("killed by signal 9" if fault == "killed" else "the deadline of 5") in told
    configure(cell.node)
    came = cell.dead(told) if "the container has ended" in told else cell.alive(whole=False)
    cell.came(f"CRIU {fault}", "checkpoint", phase, came)


@needs_memory_groups
@pytest.mark.parametrize("cell", [{"lane": "off"}], ids=["without the lane"], indirect=True)
def test_criu_out_of_memory_in_a_checkpoint(cell: Cell) -> None:
    """The kernel takes it at the limit of its control group."""
    job: Any = cell.box
    client = cell.checkpoint()
    criu = criu_halted(job)
    with struck(criu, AT_ITS_LIMIT):
        os.kill(criu, signal.SIGCONT)
        told = client.result(60)
    assert "killed by signal 9" in told
    came = cell.dead(told) if "the container has ended" in told else cell.alive(whole=False)
    cell.came("CRIU at its memory limit", "checkpoint", "dump", came)


@needs_memory_groups
def test_criu_out_of_memory_in_a_restore(cell: Cell) -> None:
    cell.end_by_checkpoint()
    client = cell.restore()
    criu = cell.node.host_pid(criu_restoring(cell.node))
    with struck(criu, AT_ITS_LIMIT):
        told = client.result(60)
    cell.came("CRIU at its memory limit", "restore", "restore", cell.restorable(told))


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
@pytest.mark.parametrize("fault", FAULTS)
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
    with struck(cell.node.host_pid(helper_calling(cell.node)), fault):
        cell.board.end_faults()
        told = client.result(90)
    configure(cell.node)
    # One that dies between two calls is followed by another, and nobody need know.
    whole = phase == "give-back" or not told
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


@pytest.mark.parametrize("fault", [*FAULTS, "driver hangs"])
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
    with struck(pid, fault) if fault != "driver hangs" else contextlib.nullcontext():
        if fault != "driver hangs":
            cell.board.end_faults()
        told = client.result(90)
    cell.board.end_faults()
    configure(cell.node)
    # Another helper may have mended it.
    came = cell.restorable(told) if told else cell.restored()
    row = fault if fault == "driver hangs" else f"helper {fault}"
    cell.came(row, "restore", "restore-gpu", came)
