"""Workloads as people run them: training, serving, trees of processes; round after round."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu import measure
from tests.gpu.conftest import WORKLOADS, gpu_memory
from tests.gpu.job import same

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.job import Job
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results

ROUNDS, PAUSES = 20, 10


def test_training_continues_bit_for_bit(
    machine: Machine,
    job: Callable[..., Job],
    images: str,
    results: Results,
    engine: str,
    tmp_path: Path,
) -> None:
    machine.configure(engine=engine, lock_timeout=30)
    training = job("train.py", "/job/status", "0.02")
    row = measure.checkpoint(training, images)
    before_the_end = training.next(20)["counter"]
    training.end()
    uninterrupted = training.lines()
    (training.shared / "status").rename(training.shared / "first")
    (training.shared / "status").touch()
    row |= measure.restore(training, images)
    last = training.next(50)["counter"]
    restored = training.lines()
    training.end()
    results.row("training", row)
    alone = tmp_path / "alone"
    words = [sys.executable, str(WORKLOADS / "train.py"), str(alone), "0"]
    subprocess.run([*words, str(max(last, before_the_end))], check=True, timeout=100)
    expected = {line["counter"]: line["loss"] for line in map(json.loads, alone.open())}
    assert restored[0]["counter"] <= uninterrupted[-1]["counter"]
    for line in uninterrupted + restored:
        if line["counter"] in expected:
            assert line["loss"] == expected[line["counter"]], line
    assert last in expected
    results.finding(
        f"training, {engine} engine",
        steps_compared=last,
        loss_first=float.fromhex(expected[1]),
        loss_last=float.fromhex(expected[last]),
    )


def test_server_answers_before_during_and_after(
    machine: Machine, job: Callable[..., Job], images: str, results: Results, engine: str
) -> None:
    machine.configure(engine=engine, lock_timeout=30)
    server = job("serve.py")
    before = server.next()
    row = measure.checkpoint(server, images)
    during = server.next()
    server.end()
    row |= measure.restore(server, images)
    after = server.next(10)
    results.row("inference server", row)
    lines = server.lines()
    assert all(line["ok"] for line in lines)
    assert {line["value"] for line in lines} == {before["value"]}
    assert during["counter"] > before["counter"]
    assert after["counter"] > before["counter"]
    slowest = max(line["seconds"] for line in lines)
    results.finding(
        f"inference server, {engine} engine", answers=len(lines), failed=0, slowest=slowest
    )


@pytest.mark.parametrize("kind", ["loader-spawn", "loader-fork", "nvml", "fork"])
def test_tree(
    machine: Machine, job: Callable[..., Job], images: str, results: Results, kind: str
) -> None:
    """Checkpointed, all of it goes on; restored, all of it is there."""
    machine.configure(engine="driver", lock_timeout=30, link_remap=True)
    tree = job("tree.py", kind)
    names = ["status", "child"] if kind in ("nvml", "fork") else ["status"]

    def goes_on() -> None:
        for name in names:
            tree.next(name=name)
        assert len(tree.processes()) == processes

    processes = len(tree.processes())
    goes_on()
    tree.checkpoint(images)
    goes_on()
    tree.save_rootfs(images)
    tree.end()
    tree.restore(images)
    goes_on()
    results.finding(f"process tree {kind}", processes=processes, restored="whole")


def test_pauses(machine: Machine, job: Callable[..., Job], results: Results) -> None:
    """The GPU taken and given back again and again, under one shim: nothing grows."""
    machine.configure(engine="driver", lock_timeout=30)
    holder = job("hold.py", "64")
    before = holder.next()
    measured = []
    for _ in range(PAUSES):
        machine.ctr("task", "pause", holder.name)
        machine.ctr("task", "resume", holder.name)
        same(before, holder.next())
        measured.append({"gpu_mib": gpu_memory(), **footprint(holder)})
    results.finding("pauses", count=PAUSES, first=measured[0], last=measured[-1])
    no_growth(measured[1], measured[-1])


@pytest.mark.timeout(500)
def test_rounds(machine: Machine, job: Callable[..., Job], images: str, results: Results) -> None:
    """Checkpoint, end, restore, again and again: nothing changes but the counter, and nothing
    grows."""
    machine.configure(engine="driver", lock_timeout=30)
    holder = job("hold.py", "64")
    before = holder.next()
    measured = []
    for number in range(1, ROUNDS + 1):
        place = Path(images).with_name(str(number)) / "checkpoint"
        place.parent.mkdir()
        row = measure.checkpoint(holder, str(place))
        holder.end()
        row |= measure.restore(holder, str(place))
        same(before, holder.next())
        measured.append({"gpu_mib": gpu_memory(), "host_mib": host_memory(), **footprint(holder)})
        if number in (1, ROUNDS):
            results.row(f"round {number}", row)
        shutil.rmtree(place.parent)
    first, last = measured[1], measured[-1]
    results.finding("rounds", count=ROUNDS, first=first, last=last)
    no_growth(first, last)
    assert last["host_mib"] <= first["host_mib"] + 256


def no_growth(first: dict[str, int], last: dict[str, int]) -> None:
    """Allowing for what an allocator keeps."""
    assert last["gpu_mib"] <= first["gpu_mib"] + 64
    assert last["shim_fds"] <= first["shim_fds"]
    assert last["shim_kib"] <= first["shim_kib"] + 4096
    assert last["job_fds"] <= first["job_fds"]
    assert last["job_kib"] <= first["job_kib"] + 256 * 1024


def host_memory() -> int:
    """Memory of the machine in use, in MiB: all but MemAvailable."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)}
    return (kib["MemTotal"] - kib["MemAvailable"]) // 1024


def footprint(holder: Job) -> dict[str, int]:
    """Open files and memory of the shim, and of all the job's processes together."""
    (records,) = Path("/run/containerd/grit").glob("*/processes")
    processes = dict(line.split()[:2] for line in records.read_text().splitlines())
    shim, job = processes["outer"], holder.processes()
    return {
        "shim_fds": open_files(shim),
        "shim_kib": resident(shim),
        "job_fds": sum(map(open_files, job)),
        "job_kib": sum(map(resident, job)),
    }


def open_files(pid: str | int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def resident(pid: str | int) -> int:
    """Memory of a process in RAM, in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1])
