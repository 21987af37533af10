"""Fixtures of the simulated GPU: the kit, boards for plain processes, and workloads that end."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.simgpu import simgpu

if TYPE_CHECKING:
    from tests.simgpu.simgpu import Kit, Report, SimGpu

DEADLINE = 30.0


def wait_for(what: str, done: Callable[[], bool]) -> None:
    """Poll until `done`; what is awaited is in another process's memory or file."""
    end = time.monotonic() + DEADLINE
    while not done():
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {DEADLINE:.0f} s")
        time.sleep(0.01)


class Workload:
    """A workload started as a plain process of this host."""

    def __init__(self, gpu: SimGpu, status: Path, *options: str, **env: str) -> None:
        self.status = status
        command = [str(gpu.kit.workload), "--tick-ms", "10", "--status", str(status), *options]
        self.process = subprocess.Popen(command, env={**gpu.host_env(), **env})
        self.pid = self.process.pid
        try:
            wait_for("first report", lambda: bool(self.reports()))
        except BaseException:
            self.kill()
            raise

    def reports(self, name: str = "main") -> list[Report]:
        suffix = "" if name == "main" else f".{name}"
        return simgpu.reports(self.status.with_name(self.status.name + suffix))

    def pid_of(self, name: str) -> int:
        """Pid as the process itself sees it, from its first report."""
        wait_for(f"report of {name}", lambda: bool(self.reports(name)))
        return self.reports(name)[0].pid

    def goes_on(self) -> Report:
        """Its latest report after two further ticks: it runs and its tokens are whole."""
        before = len(self.reports())
        wait_for("next report", lambda: len(self.reports()) >= before + 2)
        report = self.reports()[-1]
        assert report.ok, report
        return report

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def kit() -> Kit:
    return simgpu.build(simgpu.default_cache())


@pytest.fixture
def gpu(kit: Kit, tmp_path: Path) -> SimGpu:
    return simgpu.SimGpu(tmp_path / "boards", kit).create()


@pytest.fixture
def start(gpu: SimGpu, tmp_path: Path) -> Iterator[Callable[..., Workload]]:
    """Starts workloads; all end with the test."""
    started: list[Workload] = []

    def one(*options: str, **env: str) -> Workload:
        started.append(Workload(gpu, tmp_path / f"status{len(started)}", *options, **env))
        return started[-1]

    yield one
    for workload in started:
        workload.kill()
