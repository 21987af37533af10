"""Fixtures of the tests on a real GPU. Without one, and without the kit that `make gpu-test`
makes, only the test of the harness itself is collected.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu import kube_kit
from tests.gpu.job import Job, until
from tests.gpu.machine import ARCHIVE, HOME, KIT, Machine
from tests.gpu.results import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WORKLOADS = Path(__file__).parent / "workloads"
TMPFS = Path("/dev/shm/grit-gpu")
_numbers = itertools.count()  # no two jobs of a session share a name: logs are looked up by it

HERE = Path("/dev/nvidiactl").exists() and (ARCHIVE.exists() or KIT.exists())
collect_ignore_glob = [] if HERE else ["test_real_*.py"]
if HERE and kube_kit.there():
    kube_kit.install()
else:
    collect_ignore_glob += ["test_real_kube.py", "test_real_two_nodes.py"]


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    with Machine() as machine:
        yield machine


@pytest.fixture(scope="session")
def results(machine: Machine) -> Results:
    return Results.here()


@pytest.fixture(params=["driver", "plugin"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def criu(request: pytest.FixtureRequest, machine: Machine) -> str:
    """CRIU 4.2, or what a test is parametrised with."""
    version = str(getattr(request, "param", "4.2"))
    machine.use_criu(version)
    return version


@pytest.fixture
def images() -> Iterator[str]:
    """An image directory, yet to be made, in GRIT's layout, on a tmpfs."""
    shutil.rmtree(TMPFS, ignore_errors=True)
    TMPFS.mkdir()
    yield str(TMPFS / "checkpoint")
    shutil.rmtree(TMPFS)


@pytest.fixture
def job(
    machine: Machine, criu: str, images: str, results: Results, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Job]]:
    """Makes jobs out of the workloads and starts them: `job("hold.py", "64")`, under the CRIU that
    `criu` names. At the end they are removed, and the device memory must be as free as before;
    logs go to the results."""
    jobs: list[Job] = []
    before = gpu_memory()

    def start(*words: str, flags: tuple[str, ...] = (), wait: bool = True) -> Job:
        name = f"job{next(_numbers)}"
        shared = HOME / "shared" / name
        shutil.rmtree(shared, ignore_errors=True)
        shutil.copytree(WORKLOADS, shared)
        argv = [sys.executable, "-u", f"/job/{words[0]}", *words[1:]]
        every = [*machine.job_flags(), *flags]
        jobs.append(Job(machine, name, argv, shared=str(shared), flags=every))
        jobs[-1].run()
        if wait:
            jobs[-1].next(seconds=90)
        return jobs[-1]

    yield start
    for one in jobs:
        one.end()
    keep_logs(results.directory / "logs" / re.sub(r"[^\w.]+", "-", request.node.name).strip("-"))
    until("device memory is free again", lambda: gpu_memory() <= before + 64, 20, every=0.2)


def gpu_memory(card: str = "0") -> int:
    """Device memory in use on a GPU, by its number or UUID, in MiB."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    words.append(f"--id={card}")
    return int(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def keep_logs(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(HOME / "containerd.log", target.parent)
    for log in TMPFS.glob("*.work/*.log"):
        shutil.copy(log, target)
    for log in Path("/var/log/containerd-shim-grit").glob("*"):
        shutil.copy(log, target)
