"""Several CUDA processes, on all GPUs of the machine, in one container; and what is encrypted."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu import measure
from tests.gpu.job import same
from tests.gpu.machine import HOME
from tests.gpu.test_real_checkpoint import there_and_back

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.job import Job
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results


@pytest.mark.parametrize("engine", ["driver", "plugin"])
def test_several_processes_and_gpus(
    machine: Machine, job: Callable[..., Job], images: str, results: Results, engine: str
) -> None:
    machine.configure(lock_timeout=30, engine=engine)
    one = job("ranks.py", "4096")
    gpus = one.next(seconds=90)["gpus"]
    names = ["status", *(f"rank-{rank}" for rank in range(1, gpus + 1))]
    before = {name: one.next(name=name, seconds=90) for name in names}
    row = measure.checkpoint(one, images)
    for name in names:
        same(before[name], one.next(name=name))
    one.end()
    row |= measure.restore(one, images)
    for name in names:
        same(before[name], one.next(name=name))
    results.row(f"{len(names)} processes on {gpus} GPUs, {engine}", row)
    assert row["cuda"] == len(names)


def test_encrypted(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    key, scratch = HOME / "key", Path(images).parent / "scratch"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32))
    os.mkdir(scratch, 0o700)
    machine.configure(lock_timeout=30, encryption_key_file=str(key), scratch_dir=str(scratch))
    row = there_and_back(job("hold.py", "4096"), images)
    results.row("4096 MiB, encrypted", row)
    assert not list(scratch.iterdir())
