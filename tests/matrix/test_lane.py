"""The parallel lane: its helper in the middle of a file, or about to drop memory, and the disk that
its files are on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.faults import helpers
from tests.e2e.gpu import configure
from tests.matrix.failing_disk import IMAGES, LANE, mounted
from tests.matrix.strikes import FAULTS, struck
from tests.matrix.test_disk import checkpoint, restore

if TYPE_CHECKING:
    from tests.matrix.cell import Cell


def helper(cell: Cell) -> int:
    """The pid on the host of the helper that moves memory, the younger one if there are two."""
    return cell.node.host_pid(max(helpers(cell.node)))


@pytest.mark.parametrize("fault", FAULTS)
def test_helper_writes(cell: Cell, fault: str) -> None:
    """It is written once more, when the container is frozen."""
    configure(cell.node, lane_from=4096, dump_timeout=2)
    cell.restart()
    with mounted(cell.node) as disk:
        client = checkpoint(cell, "lane", disk.stop, "write", LANE)
        disk.met()
        with struck(helper(cell), fault):
            disk.mend()
            told = client.result(60)
        assert told == ""
        cell.came(f"helper {fault}", "checkpoint", "lane", cell.alive(whole=True, images=IMAGES))


@pytest.mark.parametrize("fault", FAULTS)
def test_helper_drops(cell: Cell, fault: str) -> None:
    """One that died before it was asked is followed by another; else CRIU moves the memory."""
    configure(cell.node, lane_from=4096, dump_timeout=1)
    cell.restart()
    held = cell.held("drop")
    client = cell.checkpoint()
    held.reached()
    with struck(helper(cell), fault):
        held.go_on()
        assert client.result(90) == ""
    cell.came(f"helper {fault}", "checkpoint", "drop", cell.alive(whole=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_helper_fills_in_again(cell: Cell, fault: str) -> None:
    """Another helper does it."""
    configure(cell.node, lane_from=4096, dump_timeout=4)
    cell.restart()
    with mounted(cell.node) as disk:
        client = checkpoint(cell, "refill", disk.stop, "read", LANE)
        disk.met()
        with struck(helper(cell), fault):
            disk.mend()
            told = client.result(60)
        assert told == ""
        came = cell.alive(whole=True, images=IMAGES)
    cell.came(f"helper {fault}", "checkpoint", "refill", came)


@pytest.mark.parametrize("fault", FAULTS)
def test_helper_fills_in_what_is_restored(cell: Cell, fault: str) -> None:
    """Nothing of it has run."""
    configure(cell.node, lane_from=4096, dump_timeout=4)
    with mounted(cell.node) as disk:
        cell.end_by_checkpoint(IMAGES)
        client = restore(cell, "restore", disk.stop, LANE)
        disk.met()
        with struck(helper(cell), fault):
            disk.mend()
            told = client.result(60)
        cell.came(f"helper {fault}", "restore", "restore", cell.restorable(told, IMAGES))
        cell.box.remove()
