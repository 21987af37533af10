"""The disk that a checkpoint is written to, or read from: full, failing, slow, and hung."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from shim.gritctl import messages as m
from tests.e2e.gpu import configure, until
from tests.e2e.test_gpu_failures import tmpfs
from tests.matrix.failing_disk import IMAGES, LANE, PAGES, mounted

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from tests.matrix.cell import Cell

OPERATIONS = [
    pytest.param("lane", "write", LANE, id="lane"),
    pytest.param("dump", "write", "", id="dump"),
    pytest.param("publish", "fsync", "", id="publish"),
    pytest.param("refill", "read", LANE, id="refill"),
]
"""What a checkpoint does on a disk: the phase, and whose file."""

READS = [
    pytest.param("verify", "", id="verify"),
    pytest.param("restore", PAGES, id="CRIU"),
    pytest.param("restore", LANE, id="lane"),
]
"""What a restore reads, by the phase that it is held before."""


def row(fault: str, part: str) -> str:
    return f"{fault} (the lane's files)" if part == LANE else fault


@pytest.mark.parametrize("size", ["64k", "400k"], ids=["at once", "late"])
def test_no_room_for_the_dump(cell: Cell, size: str) -> None:
    images = "/var/tmp/small/here/checkpoint"
    with tmpfs(cell.node, "/var/tmp/small", size):
        cell.node.path(images).parent.mkdir()
        told = cell.checkpoint(images).result(60)
        assert "No space left" in told or "free" in told
        came = cell.alive(whole=False, images=images)
    cell.came(f"no room on a disk of {size}", "checkpoint", "dump", came)


# --- failing ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_failing_disk_in_a_checkpoint(cell: Cell, call: str) -> None:
    """A file system in user space answers with EIO from one moment on."""
    with mounted(cell.node) as disk:
        disk.fail(call)
        told = cell.checkpoint(IMAGES).result(60)
        assert told
        disk.mend()
        came = cell.alive(whole=False, images=IMAGES)
    phase = {"write": "dump", "fsync": "publish", "rename": "publish"}[call]
    cell.came(f"{call} fails with EIO", "checkpoint", phase, came)


def test_failing_disk_under_the_lane(cell: Cell) -> None:
    """Its files cannot be written: CRIU moves the memory."""
    with mounted(cell.node) as disk:
        disk.fail("write", LANE)
        assert cell.checkpoint(IMAGES).result(60) == ""
        disk.mend()
        assert not list(cell.node.path(IMAGES).glob("lane-*"))
        came = cell.alive(whole=True, images=IMAGES)
    cell.came("write fails with EIO", "checkpoint", "lane", came)


def test_failing_disk_in_a_refill(cell: Cell) -> None:
    """The only copy of the memory cannot be read: the container stands still until it can."""
    with mounted(cell.node) as disk:
        told = checkpoint(cell, "refill", disk.fail, "read", LANE).result(60)
        assert "stays frozen" in told
        assert cell.box.status() == m.PAUSED
        disk.mend()
        cell.box.begin("Resume").result()
        came = cell.alive(whole=True, images=IMAGES)
    cell.came("read fails with EIO", "checkpoint", "refill", f"{came} once it can be read")


def test_disk_that_fails_to_withdraw(cell: Cell) -> None:
    """What was published stays, as the client is told; the container does not wait for that."""
    with mounted(cell.node) as disk:
        held = cell.held("let-go")
        client = cell.checkpoint(IMAGES)
        held.reached()
        for pid in cell.node.pids("criu"):
            os.kill(cell.node.host_pid(pid), signal.SIGKILL)
        disk.fail("rename")
        held.go_on()
        told = client.result(60)
        disk.mend()
        assert "killed by signal 9" in told
        assert "remove it by hand" in told
        came = cell.alive(whole=True, images=IMAGES)
    cell.came("CRIU killed, rename fails with EIO", "checkpoint", "let-go", f"told, {came}")


@pytest.mark.parametrize(("phase", "part"), READS)
def test_failing_disk_in_a_restore(cell: Cell, phase: str, part: str) -> None:
    with mounted(cell.node) as disk:
        cell.end_by_checkpoint(IMAGES)
        told = restore(cell, phase, disk.fail, part).result(60)
        disk.mend()
        came = cell.restorable(told, IMAGES)
        cell.box.remove()
    cell.came(row("read fails with EIO", part), "restore", phase, came)


# --- slow ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "operation", "part"), OPERATIONS)
def test_slow_disk_in_a_checkpoint(cell: Cell, phase: str, operation: str, part: str) -> None:
    """Nothing is given up before its deadline."""
    with mounted(cell.node) as disk:
        client = checkpoint(cell, phase, disk.slow, operation, part)
        disk.met()
        assert client.result(60) == ""
        disk.mend()
        cell.came("slow disk", "checkpoint", phase, cell.alive(whole=True, images=IMAGES))


@pytest.mark.parametrize(("phase", "part"), READS)
def test_slow_disk_in_a_restore(cell: Cell, phase: str, part: str) -> None:
    with mounted(cell.node) as disk:
        cell.end_by_checkpoint(IMAGES)
        client = restore(cell, phase, disk.slow, part)
        disk.met()
        assert client.result(60) == ""
        disk.mend()
        cell.came(row("slow disk", part), "restore", phase, cell.restored())
        cell.box.remove()


# --- hung ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("phase", "operation", "part"), OPERATIONS)
def test_hung_disk_in_a_checkpoint(cell: Cell, phase: str, operation: str, part: str) -> None:
    """Its server is stopped for a while, as an NFS server may be that nobody answers for."""
    with mounted(cell.node) as disk:
        client = checkpoint(cell, phase, disk.stop, operation, part)
        disk.met()
        until("the shim's State", cell.box.status)
        disk.mend()
        assert client.result(60) == ""
        came = cell.alive(whole=True, images=IMAGES)
    cell.came("disk hung for a while", "checkpoint", phase, came)


@pytest.mark.parametrize(("phase", "part"), READS)
def test_hung_disk_in_a_restore(cell: Cell, phase: str, part: str) -> None:
    with mounted(cell.node) as disk:
        cell.end_by_checkpoint(IMAGES)
        client = restore(cell, phase, disk.stop, part)
        disk.met()
        disk.mend()
        assert client.result(60) == ""
        cell.came(row("disk hung for a while", part), "restore", phase, cell.restored())
        cell.box.remove()


@pytest.mark.parametrize(
    "cell", [{"lane": "off", "dump_timeout": 2}], ids=["without the lane"], indirect=True
)
@pytest.mark.parametrize(("phase", "operation"), [("dump", "write"), ("publish", "fsync")])
def test_disk_hung_for_good(cell: Cell, phase: str, operation: str) -> None:
    hangs_for_good(cell, phase, operation, "")


def test_disk_hung_for_good_under_the_lane(cell: Cell) -> None:
    """Before anything is dropped."""
    configure(cell.node, lane_from=4096, dump_timeout=2)
    cell.restart()
    hangs_for_good(cell, "lane", "write", LANE)


def hangs_for_good(cell: Cell, phase: str, operation: str, part: str) -> None:
    """The container runs on while it still hangs."""
    with mounted(cell.node) as disk:
        client = checkpoint(cell, phase, disk.stop, operation, part)
        disk.met()
        until("RUNNING", lambda: cell.box.status() == m.RUNNING)
        cell.box.check()
        disk.mend()
        assert client.result(60)
        came = cell.alive(whole=False, images=IMAGES)
    cell.came("disk hung past the deadline", "checkpoint", phase, came)


def test_disk_hung_for_good_in_a_refill(cell: Cell) -> None:
    """The only copy of the memory is on it: the container stands still as long."""
    configure(cell.node, lane_from=4096, dump_timeout=2)
    cell.restart()
    with mounted(cell.node) as disk:
        client = checkpoint(cell, "refill", disk.stop, "read", LANE)
        disk.met()
        told = client.result(60)
        assert "stays frozen" in told
        assert cell.box.status() == m.PAUSED
        disk.mend()
        cell.box.begin("Resume").result()
        came = cell.alive(whole=True, images=IMAGES)
    cell.came("disk hung past the deadline", "checkpoint", "refill", f"{came} once it can be read")


@pytest.mark.parametrize("part", [PAGES, LANE], ids=["CRIU", "lane"])
def test_disk_hung_for_good_in_a_restore(cell: Cell, part: str) -> None:
    """The client is told while it still hangs."""
    configure(cell.node, lane_from=4096, dump_timeout=2, restore_timeout=2)
    with mounted(cell.node) as disk:
        cell.end_by_checkpoint(IMAGES)
        client = restore(cell, "restore", disk.stop, part)
        disk.met()
        told = client.result(60)
        disk.mend()
        came = cell.restorable(told, IMAGES)
        cell.box.remove()
    cell.came(row("disk hung past the deadline", part), "restore", "restore", came)


# --- the moment ---------------------------------------------------------------------------


def checkpoint(
    cell: Cell, phase: str, arm: Callable[[str, str], None], operation: str, part: str
) -> Future[str]:
    """One whose disk is told, right before the phase, what to do about the operation."""
    held = cell.held(phase)
    client = cell.checkpoint(IMAGES)
    held.reached()
    arm(operation, part)
    held.go_on()
    return client


def restore(cell: Cell, phase: str, arm: Callable[[str, str], None], part: str) -> Future[str]:
    """The same, about reads."""
    held = cell.held(phase)
    client = cell.restore()
    held.reached()
    arm("read", part)
    held.go_on()
    return client
