"""Faults in encrypted checkpoints and their restores. What the other tests here look for must hold,
and nothing may be left in the clear, whoever dies."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from shim import failpoint
from tests.e2e.faults import criu_halted
from tests.e2e.gpu import until
from tests.e2e.test_encrypted import KEY, SETTINGS, give_key
from tests.e2e.test_gpu_failures import tmpfs
from tests.e2e.test_gritctl_stored import gritctl
from tests.matrix import test_daemon
from tests.matrix.cell import PLACE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.matrix.cell import Cell

SCRATCH = "/var/tmp/scratch"

pytestmark = pytest.mark.parametrize(
    "cell", [{**SETTINGS, "scratch_dir": SCRATCH}], ids=["encrypted"], indirect=True
)


@pytest.fixture
def scratch(cell: Cell) -> Iterator[Path]:
    """Where the images lie in the clear meanwhile; empty at the end, without another checkpoint or
    restore that would remove what was left."""
    key, path = give_key(cell.node), cell.node.path(SCRATCH)
    path.mkdir()
    cell.kind = ", encrypted"
    yield path
    _empty(path)
    shutil.rmtree(path)
    shutil.rmtree(key.parent)


def _empty(scratch: Path) -> None:
    until("the end of what is in the clear", lambda: not os.listdir(scratch))


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
@pytest.mark.parametrize("error", ["raise", "ENOSPC"])
def test_error_in_a_checkpoint(cell: Cell, scratch: Path, phase: str, error: str) -> None:
    test_daemon.test_error_in_a_checkpoint(cell, phase, error)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_error_in_a_restore(cell: Cell, scratch: Path, phase: str) -> None:
    test_daemon.test_error_in_a_restore(cell, phase, "raise")


@pytest.mark.parametrize("phase", ["dump", "publish", "let-go"])
def test_criu_killed_in_a_checkpoint(cell: Cell, scratch: Path, phase: str) -> None:
    """When it has the processes in its hands, before and after the checkpoint is published."""
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    assert os.listdir(scratch)
    if phase == "dump":
        held.go_on()
        job: Any = cell.box
        os.kill(criu_halted(job), signal.SIGKILL)
    else:
        for pid in cell.node.pids("criu"):
            os.kill(cell.node.host_pid(pid), signal.SIGKILL)
        held.go_on()
    told = client.result(60)
    assert "killed by signal 9" in told
    _empty(scratch)
    came = cell.dead(told) if "the container has ended" in told else cell.alive(whole=False)
    cell.came("CRIU killed", "checkpoint", phase, came)


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_daemon_killed_in_a_checkpoint(cell: Cell, scratch: Path, phase: str) -> None:
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    assert os.listdir(scratch)
    test_daemon.strike(cell, signal.SIGKILL)
    held.remove()
    told = client.result(60)
    _empty(scratch)
    came = cell.dead(told, whole=phase in test_daemon.AFTER)
    cell.came("daemon killed", "checkpoint", phase, came)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_daemon_killed_in_a_restore(cell: Cell, scratch: Path, phase: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    pid = held.reached()
    assert bool(os.listdir(scratch)) == (phase != "verify")
    os.kill(cell.node.host_pid(pid), signal.SIGKILL)
    held.remove()
    told = client.result(60)
    _empty(scratch)
    cell.came("daemon killed", "restore", phase, cell.restorable(told))


def test_no_room_in_the_clear(cell: Cell, scratch: Path) -> None:
    """Refused before anything is done: to a container, or for one that is to be restored."""
    said = "free space, or set scratch_dir to another directory"
    with tmpfs(cell.node, SCRATCH, "64k"):
        told = cell.checkpoint().result(60)
        assert f"{said}; nothing was done" in told
    came = cell.alive(whole=False)
    cell.came("no room in scratch_dir", "checkpoint", "lock", came)


def test_no_room_in_the_clear_for_a_restore(cell: Cell, scratch: Path) -> None:
    cell.end_by_checkpoint()
    with tmpfs(cell.node, SCRATCH, "64k"):
        told = cell.restore().result(60)
        assert "free space, or set scratch_dir to another directory" in told
        assert os.listdir(scratch) == []
    cell.came("no room in scratch_dir", "restore", "create", cell.restorable(told))


def test_by_gritctl(cell: Cell, scratch: Path) -> None:
    """The restored container's daemon has the same grit.toml."""
    where = f"{PLACE}/saved"
    gritctl(cell.node, "checkpoint", "job", "--to", where, "--exit")
    assert b"grit-sealed1" in cell.node.path(f"{where}/checkpoint/inventory.img").read_bytes()
    assert "encrypted (AES-256-GCM" in gritctl(cell.node, "verify", where)
    assert "CRIU" in gritctl(cell.node, "show", where)
    gritctl(cell.node, "diff", where, where)
    cell.node.path(KEY).write_text("cd" * 32)
    told = gritctl(cell.node, "verify", where, status=4)
    assert "it is encrypted: the key is " in told
    give_key(cell.node)
    cell.box.remove()
    gritctl(cell.node, "restore", where)
    _empty(scratch)
    cell.box.check()
