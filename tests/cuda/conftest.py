"""Fixtures for the CUDA side: a simulated GPU, processes on it, a driver, a cgroup that freezes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shim.cuda import discovery, record
from shim.cuda.driver import Driver
from shim.cuda.engine import Policy
from tests.cuda.freezer import Freezer
from tests.cuda.simulated import Workload
from tests.simgpu.simgpu import Kit, SimGpu, build, default_cache

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def kit() -> Kit:
    return build(default_cache())


@pytest.fixture
def board(kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimGpu:
    """One GPU of the test's own, whose device is not below /dev."""
    made = SimGpu(tmp_path / "gpus", kit).create()
    monkeypatch.setattr(discovery, "DEVICE_PREFIX", made.host_env()["SIMGPU_DEV_PREFIX"])
    monkeypatch.setenv("SIMGPU_DIR", str(made.directory))  # where the helper's NVML looks
    return made


@pytest.fixture
def workload(board: SimGpu) -> Iterator[Callable[..., Workload]]:
    """Starts workloads; by default with CUDA initialised and 4 MiB of device memory."""
    started: list[Workload] = []

    def start(*, cuda: bool = True, before: tuple[str, ...] = ()) -> Workload:
        new = Workload(board, before=before)
        started.append(new)
        if cuda:
            new.do("init")
            new.do(f"hold {4 * MIB}")
        return new

    yield start
    for one in started:
        one.kill()


@pytest.fixture
def driver(kit: Kit) -> Iterator[Driver]:
    made = Driver(sys.executable, str(kit.libcuda))
    yield made
    made.close()


# A driver from before the checkpoint calls (r550: CUDA 12.4).
OLD_LIBCUDA = """
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuGetErrorName(int code, const char **name) { (void)code; (void)name; return 1; }
"""


@pytest.fixture
def old_libcuda(tmp_path: Path) -> Path:
    directory = tmp_path / "old"
    directory.mkdir()
    source, library = directory / "old.c", directory / "libcuda.so.1"
    source.write_text(OLD_LIBCUDA)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.fixture
def nvidia_command(kit: Kit, tmp_path: Path) -> Path:
    """Stands for NVIDIA's binary beside a driver that has no API: our own command on the
    simulated driver, as a program of its own."""
    path = tmp_path / "nvidia" / "cuda-checkpoint"
    path.parent.mkdir()
    path.write_text(
        f"#!/bin/sh\nunset {record.VARIABLE}\nLD_LIBRARY_PATH={kit.libcuda.parent} "
        f'PYTHONPATH={ROOT} exec {sys.executable} -m shim.cuda.command "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def policy() -> Policy:
    """Patient: only a test about a timeout uses a shorter one."""
    return new_policy()


def new_policy(
    *, engine: str = "driver", lock_timeout: float = 60, copy_timeout: float = 60
) -> Policy:
    return Policy(
        engine=engine,
        lock_timeout=lock_timeout,
        copy_timeout=copy_timeout,
        prefault=(4096, 2),
        plugin_dir="/nonexistent",
        criu_version=lambda: (4, 1, 1),
    )


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    made = Freezer(f"grit-test-{os.getpid()}")
    yield made
    made.remove()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """16 MiB of it."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)
