"""The seed's case on a real GPU, and what it costs for states of different sizes."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu import measure
from tests.gpu.job import same

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.job import Job
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results


def there_and_back(job: Job, images: str, *, announce: bool = False) -> measure.Row:
    """Checkpoint, the job goes on, kill, restore, the job goes on."""
    before = job.next()
    row = measure.checkpoint(job, images, announce=announce)
    same(before, job.next())
    lines = len(job.lines())
    job.end()
    row |= measure.restore(job, images)
    after = job.next()
    same(before, after)
    assert after["counter"] < lines + 1000  # from where it was, not from the beginning
    assert after["pid"] == before["pid"]
    return row


@pytest.mark.parametrize("criu", ["4.1", "4.2"], indirect=True)
def test_seed(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    engine: str,
    criu: str,
) -> None:
    machine.configure(engine=engine, lock_timeout=30, lane="off")
    row = there_and_back(job("hold.py", "64"), images)
    results.row("seed", row)
    assert row["criu"].startswith(criu)
    assert row["engine"] == engine
    assert row["cuda"] == 1
    assert row["bytes"] >= 500e6
    assert row["files"] >= 40
    assert row["biggest"].startswith("pages-")
    assert row["biggest_bytes"] >= 64 << 20
    log = Path(f"{images}.work/dump.log").read_text(errors="replace")
    assert [
        line for line in log.splitlines() if "timeout" in line.lower() and "Error" in line
    ] == []


@pytest.mark.parametrize("criu", ["4.1", "4.2"], indirect=True)
def test_counter(
    machine: Machine, job: Callable[..., Job], images: str, results: Results, engine: str
) -> None:
    """A number that only the GPU adds to goes on where it was."""
    machine.configure(engine=engine, lock_timeout=30)
    counter = job("counter.py")
    row = measure.checkpoint(counter, images)
    counter.end()
    at_the_end = counter.lines()[-1]["counter"]
    row |= measure.restore(counter, images)
    after = counter.next()
    results.row("CUDA counter", row)
    assert all(line["ticks"] == line["counter"] for line in counter.lines())
    assert after["counter"] <= at_the_end + 1000


@pytest.mark.parametrize(
    ("engine", "megabytes"),
    list(itertools.product(["driver", "plugin"], [512, 2048, 8192, 16384, 61440])),
)
def test_sizes(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    engine: str,
    megabytes: int,
) -> None:
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < (megabytes << 20) * 2.2:
        pytest.skip("no memory for the process and its images")
    machine.configure(engine=engine, lock_timeout=30)
    row = there_and_back(job("hold.py", str(megabytes)), images, announce=True)
    results.row(f"{megabytes} MiB tensor", row)
    assert row["bytes"] >= megabytes << 20


def test_restore_without_the_plugin(
    machine: Machine, job: Callable[..., Job], images: str, results: Results
) -> None:
    machine.configure(engine="plugin", lock_timeout=30)
    holder = job("hold.py", "1")
    before = holder.next()
    holder.checkpoint(images)
    holder.end()
    machine.configure(plugin_dir="/nonexistent")
    done = holder.restore(images, check=False)
    results.finding("plugin images without the plugin", exit=done.returncode, told=done.stderr)
    assert done.returncode != 0
    assert "cuda_plugin.so" in done.stderr
    holder.end()
    machine.configure()
    holder.restore(images)
    same(before, holder.next())


def test_device_map_of_the_same_gpu(
    machine: Machine, job: Callable[..., Job], results: Results
) -> None:
    machine.configure()
    holder = job("hold.py", "64")
    before = holder.next()
    smi = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader", "--id=0"]
    uuid = machine.run(smi).stdout.strip()
    pid = str(holder.pid())
    states = []
    for action in ("lock", "checkpoint", "restore", "unlock"):
        mapped = ["--device-map", f"{uuid}={uuid}"] if action == "restore" else []
        machine.run([machine.command, "--action", action, "--pid", pid, *mapped])
        states.append(machine.run([machine.command, "--get-state", "--pid", pid]).stdout.strip())
    results.finding("device map of a GPU to itself", states=states)
    assert states == ["locked", "checkpointed", "locked", "running"]
    same(before, holder.next())
