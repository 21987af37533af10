"""GRIT's quick start, steps 3 to 5, from one node to another, each with a GPU of its own; where the
machine has only one, both nodes have that."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from shim import devices
from tests.gpu import kube, two_nodes
from tests.gpu.conftest import TMPFS, gpu_memory
from tests.gpu.job import TENSORS
from tests.gpu.machine import gpu_devices
from tests.gpu.results import Results

if TYPE_CHECKING:
    from tests.gpu.kube import Given
    from tests.gpu.played import PlayedNode


def given(node: PlayedNode, card: int) -> Given:
    """One GPU of the machine's, and what all of them share."""
    other = [f"/dev/nvidia{number}" for number in _numbers() if number != card]
    return kube.given(node, [path for path in gpu_devices() if path not in other])


def _numbers() -> list[int]:
    every = (path.removeprefix("/dev/nvidia") for path in gpu_devices())
    return [int(text) for text in every if text.isdigit()]


@pytest.mark.timeout(240)
def test_the_quick_start_on_two_nodes() -> None:
    numbers = _numbers()
    known = devices.installed()
    cards = two_nodes.Cards(
        of=(numbers[0], numbers[-1]),
        given=given,
        used=lambda card: gpu_memory(known[card]["uuid"]) << 20,
    )
    workload = two_nodes.Workload([sys.executable, "-u", "/job/hold.py", "2048"], TENSORS)
    shutil.rmtree(TMPFS, ignore_errors=True)
    store = TMPFS / "store"
    store.mkdir(parents=True)
    two_nodes.quick_start(workload, cards, store, Results.here())
    shutil.rmtree(TMPFS)
