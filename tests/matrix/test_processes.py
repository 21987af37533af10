"""CRIU and the CUDA helper killed, or stopped for ever, and a driver that hangs, in each phase in
which they are at work."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.faults import (
    criu_halted,
    criu_restoring,
    helper_calling,
)
from tests.e2e.gpu import configure, until

if TYPE_CHECKING:
    from tests.matrix.cell import Cell

MEMORY = Path("/sys/fs/cgroup/memory")
MEMORY_GROUP = MEMORY / "grit-matrix"
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


@pytest.mark.skipif(not MEMORY.is_dir(), reason="this host has no v1 memory controller")
@pytest.mark.parametrize("cell", [{"lane": "off"}], ids=["without the lane"], indirect=True)
def test_criu_out_of_memory_in_a_checkpoint(cell: Cell) -> None:
    """The kernel takes it at the limit of its control group."""
    job: Any = cell.box
    client = cell.checkpoint()
    criu = criu_halted(job)
    MEMORY_GROUP.mkdir(exist_ok=True)
    try:
        (MEMORY_GROUP / "memory.limit_in_bytes").write_text("65536")
        (MEMORY_GROUP / "cgroup.procs").write_text(str(criu))
        os.kill(criu, signal.SIGCONT)
        told = client.result(60)
        assert "oom_kill 0" not in (MEMORY_GROUP / "memory.oom_control").read_text()
    finally:
        until("the end of CRIU", lambda: not (MEMORY_GROUP / "cgroup.procs").read_text())
        MEMORY_GROUP.rmdir()
    assert "killed by signal 9" in told
    came = cell.dead(told) if "the container has ended" in told else cell.alive(whole=False)
    cell.came("CRIU at its memory limit", "checkpoint", "dump", came)


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
