"""The lane on a real GPU, beside the same without it: the same tensors, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.job import same, until
from tests.gpu.test_real_checkpoint import there_and_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.job import Job
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results


@pytest.mark.parametrize(
    ("megabytes", "settings"),
    [
        (2048, {}),
        (16384, {"lane": "off"}),
        (16384, {}),
        (16384, {"checksum": "sha256"}),
        (16384, {"engine": "plugin"}),
    ],
    ids=["small", "without", "with", "sha256", "plugin"],
)
def test_there_and_back(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    megabytes: int,
    settings: dict[str, str],
) -> None:
    machine.configure(lock_timeout=30, **settings)
    one = job("hold.py", str(megabytes))
    results.finding("huge pages", enabled=_thp("enabled"), defrag=_thp("defrag"))
    row = there_and_back(one, images)
    named = ", ".join(f"{key} = {value}" for key, value in settings.items())
    results.row(f"{megabytes} MiB tensor, {named or 'as it comes'}", row)
    lane = not settings.keys() & {"lane", "engine"}
    assert row["biggest"].startswith("lane-" if lane else "pages-")


def test_ended_by_the_dump(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    """Nothing is filled in again there."""
    machine.configure(lock_timeout=30)
    one = job("hold.py", "2048")
    before = one.next()
    one.checkpoint(images, "--exit")
    until("the end", lambda: one.status() == "STOPPED")
    one.end()
    one.restore(images)
    same(before, one.next())


def _thp(name: str) -> str:
    return Path(f"/sys/kernel/mm/transparent_hugepage/{name}").read_text().strip()
