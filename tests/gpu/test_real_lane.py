"""The lane on a real GPU, beside the same without it: the same tensors, and what it costs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu import measure
from tests.gpu.job import same, until
from tests.gpu.machine import HOME
from tests.gpu.test_real_checkpoint import there_and_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.gpu.job import Job
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

SIZES = pytest.mark.parametrize(
    ("megabytes", "settings"),
    [
        (2048, {}),
        (16384, {"lane": "off"}),
        (16384, {}),
        (16384, {"engine": "plugin"}),
    ],
    ids=["small", "without", "with", "plugin"],
)


@pytest.fixture(params=["as it is", "always"])
def huge_pages(request: pytest.FixtureRequest) -> Iterator[str]:
    """The machine's transparent huge pages, put back afterwards."""
    before = THP.read_text().partition("[")[2].partition("]")[0]
    if request.param == "always":
        THP.write_text("always")
    yield THP.read_text().partition("[")[2].partition("]")[0]
    THP.write_text(before)


@SIZES
def test_there_and_back(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    huge_pages: str,
    megabytes: int,
    settings: dict[str, str],
) -> None:
    machine.configure(lock_timeout=30, **settings)
    row = there_and_back(job("hold.py", str(megabytes)), images)
    results.row(f"{megabytes} MiB, goes on, {_said(settings, huge_pages)}", row)
    assert _in_lane(images) == (not settings.keys() & {"lane", "engine"})


@pytest.mark.parametrize("megabytes", [2048, 16384])
def test_announced(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    huge_pages: str,
    megabytes: int,
) -> None:
    """Written before the freeze."""
    machine.configure(lock_timeout=30)
    row = there_and_back(job("hold.py", str(megabytes)), images, announce=True)
    results.row(f"{megabytes} MiB, goes on, announced, huge pages {huge_pages}", row)
    assert row["lane_check"]


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_to_the_disk(
    machine: Machine, job: Callable[..., Job], results: Results, direct: bool
) -> None:
    """Not to a tmpfs, as all others: `images` of its own."""
    machine.configure(lock_timeout=30, lane_direct=direct)
    place = HOME / "disk"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        row = there_and_back(job("hold.py", "8192"), str(place / "checkpoint"), announce=True)
    finally:
        shutil.rmtree(place)
    results.row(f"8192 MiB, goes on, to the disk, lane_direct = {direct}", row)


@SIZES
def test_ended_by_the_dump(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    megabytes: int,
    settings: dict[str, str],
) -> None:
    """Nothing is filled in again there."""
    machine.configure(lock_timeout=30, **settings)
    one = job("hold.py", str(megabytes))
    before = one.next()
    began = time.monotonic()
    one.checkpoint(images, "--exit")
    until("the end", lambda: one.status() == "STOPPED")
    row = measure.described(Path(images)) | {"checkpoint": time.monotonic() - began}
    one.end()
    row |= measure.restore(one, images)
    results.row(f"{megabytes} MiB, ends, {_said(settings)}", row)
    same(before, one.next())


def _said(settings: dict[str, str], huge_pages: str = "") -> str:
    said = [f"{key} = {value}" for key, value in settings.items()] or ["as it comes"]
    return ", ".join([*said, *([f"huge pages {huge_pages}"] if huge_pages else [])])


def _in_lane(images: str) -> bool:
    return any(Path(images).glob("lane-*"))
