"""The disk that a checkpoint is written to, or read from: full, failing, and hung."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import configure, until
from tests.e2e.test_gpu_failures import tmpfs
from tests.matrix import failing_disk

if TYPE_CHECKING:
    from tests.matrix.cell import Cell

DISK = "/var/tmp/disk"
IMAGES = f"{DISK}/here/checkpoint"


@pytest.mark.parametrize("size", ["64k", "400k"], ids=["at once", "late"])
def test_no_room_for_the_dump(cell: Cell, size: str) -> None:
    with tmpfs(cell.node, DISK, size):
        cell.node.path(IMAGES).parent.mkdir()
        told = cell.checkpoint(IMAGES).result(60)
        assert "No space left" in told or "free" in told
        came = cell.alive(whole=False, images=IMAGES)
    cell.came(f"no room on a disk of {size}", "checkpoint", "dump", came)


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_failing_disk_in_a_checkpoint(cell: Cell, call: str) -> None:
    """A file system in user space answers with EIO from one moment on."""
    with failing_disk.mounted(cell.node, DISK) as disk:
        cell.node.path(IMAGES).parent.mkdir()
        disk.fail(call)
        told = cell.checkpoint(IMAGES).result(60)
        assert told
        disk.mend()
        came = cell.alive(whole=False, images=IMAGES)
    phase = {"write": "dump", "fsync": "publish", "rename": "publish"}[call]
    cell.came(f"{call} fails with EIO", "checkpoint", phase, came)


def test_failing_disk_in_a_restore(cell: Cell) -> None:
    with failing_disk.mounted(cell.node, DISK) as disk:
        cell.node.path(IMAGES).parent.mkdir()
        cell.end_by_checkpoint(IMAGES)
        disk.fail("read")
        told = cell.restore().result(60)
        disk.mend()
        came = cell.restorable(told, IMAGES)
        cell.box.remove()
    cell.came("read fails with EIO", "restore", "verify", came)


def test_hung_disk_in_a_checkpoint(cell: Cell) -> None:
    """Its server is stopped, as an NFS server may be that nobody answers for."""
    configure(cell.node, dump_timeout=2)
    cell.restart()
    with failing_disk.mounted(cell.node, DISK) as disk:
        cell.node.path(IMAGES).parent.mkdir()
        client = cell.checkpoint(IMAGES)
        disk.stop_at("write")
        until("the shim's State", cell.box.status)
        disk.mend()
        told = client.result(60)
        configure(cell.node)
        came = cell.alive(whole=not told, images=IMAGES)
    cell.came("disk hung for a while", "checkpoint", "dump", came)
