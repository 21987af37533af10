"""What is held against a checkpoint: from made-up processes, file systems and words of NVML."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from shim import preflight
from shim.config import GritOptions
from shim.cuda import discovery, limits
from shim.cuda.driver import Library
from shim.cuda.errors import LibraryError
from shim.cuda.survey import Device, Survey, Use

MIB = 1 << 20
ME = os.getpid()
IO_URING_SETUP = 425


def comm() -> str:
    return Path("/proc/self/comm").read_text().strip()


def io_uring() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(IO_URING_SETUP, 4, ctypes.create_string_buffer(120))
    if fd < 0:
        pytest.skip(f"no io_uring here: {os.strerror(ctypes.get_errno())}")
    return fd


def test_io_uring_is_found_with_its_holder() -> None:
    assert preflight.against_dump([ME]) == []
    fd = io_uring()
    try:
        (told,) = preflight.against_dump([ME, 2**22 + 1])
    finally:
        os.close(fd)
    assert told.startswith(f"pid {ME} ({comm()}) uses io_uring (holds anon_inode:[io_uring] open)")
    assert "UV_USE_IO_URING=0" in told


def statvfs(monkeypatch: pytest.MonkeyPatch, free: int, blocks: int = 1 << 30) -> None:
    """Every file system has so many bytes free from now on."""

    class Found:
        f_bfree = free // 4096
        f_frsize = 4096
        f_blocks = blocks

    monkeypatch.setattr(os, "statvfs", lambda path: Found)
    monkeypatch.setattr(preflight, "_private_memory", lambda pid: 100 * MIB)


def test_both_figures_are_named_where_images_cannot_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    images = str(tmp_path / "draft")
    statvfs(monkeypatch, 350 * MIB)
    (told,) = preflight.against_space(images, [1, 2], 400 * MIB)
    assert told.startswith(
        "the images need at least 536.0 MiB (200.0 MiB of memory and 400.0 MiB of device memory), "
        f"and 350.0 MiB are free in {tmp_path}"
    )
    statvfs(monkeypatch, 536 * MIB)
    assert preflight.against_space(images, [1, 2], 400 * MIB) == []


def test_what_is_not_certain_is_not_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    statvfs(monkeypatch, 0, blocks=0)  # a file system that does not say
    assert preflight.against_space(str(tmp_path), [1], 0) == []
    statvfs(monkeypatch, 0)
    assert len(preflight.against_space(str(tmp_path), [1], 0)) == 1
    monkeypatch.setattr(preflight, "_file_system", lambda path: "btrfs")  # which compresses
    assert preflight.against_space(str(tmp_path), [1], 0) == []


def test_a_process_has_memory_and_a_path_a_file_system() -> None:
    assert preflight._private_memory(ME) > MIB
    assert preflight._private_memory(2**22 + 1) == 0
    assert preflight._file_system("/proc/self") == "proc"


def test_a_criu_that_cannot_be_used_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = preflight.against_criu(GritOptions(criu="/nowhere/criu"))
    assert told.startswith("CRIU cannot be used: ")
    monkeypatch.setattr("shim.criu_bridge.client.version", lambda criu: (3, 17, 1))
    (told,) = preflight.against_criu(GritOptions())
    assert told.startswith("CRIU is 3.17.1, and 4.1 or later is needed")
    monkeypatch.setattr("shim.criu_bridge.client.version", lambda criu: (4, 1, 0))
    assert preflight.against_criu(GritOptions()) == []


# ---- what the driver cannot do


def survey(**marks: bool) -> Survey:
    use = Use("GPU-1", ME, 5 * MIB, **{"mig": False, "mps": False, **marks})
    return Survey([Device("GPU-1", 10 * MIB, 5 * MIB, mig=True)], [use])


def test_what_nvml_says_is_a_reason() -> None:
    assert limits.reasons(ME, survey(), 580) == []
    (told,) = limits.reasons(ME, survey(mig=True), 580)
    assert told.startswith("is on a MIG instance (NVML lists it on a MIG instance of GPU-1)")
    (told,) = limits.reasons(ME, survey(mps=True), None)
    assert told.startswith("is a client of MPS (NVML lists it so on GPU-1)")
    assert limits.reasons(1, survey(mig=True, mps=True), 580) == []


def test_of_a_driver_that_is_not_known_yet_nothing_is_claimed() -> None:
    assert limits.reasons(ME, survey(mig=True), limits.KNOWN_UP_TO + 1) == []
    assert len(limits.reasons(ME, survey(mig=True), limits.KNOWN_UP_TO)) == 1
    assert [limits.major(v) for v in ("580.159.04", "", None, "x.1")] == [580, None, None, None]


@pytest.mark.parametrize(("number", "mig"), [(1, False), (2, False), (21, True), (512, False)])
def test_the_capability_of_a_mig_instance_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mig: bool
) -> None:
    monkeypatch.setattr(limits, "_CAPABILITIES", f"{tmp_path}/nvidia-cap")
    minors = tmp_path / "mig-minors"
    minors.write_text("config 1\nmonitor 2\ngpu0/gi2/access 21\ngpu0/gi2/ci0/access 22\n")
    monkeypatch.setattr(limits, "_MIG_MINORS", str(minors))
    file = tmp_path / f"nvidia-cap{number}"
    with open(file, "w"):
        found = limits.reasons(ME, Survey(), 580)
    assert found == (
        [f"is on a MIG instance (holds {file} open), which the driver cannot checkpoint"]
        if mig
        else []
    )


def test_suspicions_name_what_was_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(uvm: int = 0, control: str = "") -> str:
        monkeypatch.setattr(limits, "_uvm_mappings", lambda pid: uvm)
        monkeypatch.setattr(limits, "_mps_control", lambda pid: control)
        return limits.suspects(ME)

    assert "UVM" not in seen() and "MPS" not in seen()
    assert "CUDA IPC memory" in seen()
    assert "some of the 6 MiB mapped from /dev/nvidia-uvm" in seen(uvm=6 * MIB)
    assert "MPS, whose control socket /mps/control it can reach" in seen(control="/mps/control")


def test_mps_is_looked_for_where_the_process_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_MPS_DEFAULT", str(tmp_path))
    assert limits._mps_control(ME) == ""
    (tmp_path / "control").touch()
    assert limits._mps_control(ME) == f"{tmp_path}/control"
    assert limits._uvm_mappings(ME) == 0


class FakeDriver:
    """A helper that found this library, or none."""

    def __init__(self, library: Library | None) -> None:
        self.found = library

    def library(self) -> Library:
        if self.found is None:
            raise LibraryError("no libcuda.so.1 on this node")
        return self.found

    def survey(self, pids: list[int], *, timeout: float) -> Survey:
        return survey()


def held_against(
    library: Library | None, *, devices: bool = True, **settings: Any
) -> tuple[list[str], str]:
    driver: Any = FakeDriver(library)
    candidate = discovery.Candidate(ME, 1, (7,), "trainer", devices)
    problems, engine, _ = preflight.against_cuda(GritOptions(**settings), driver, [candidate])
    return problems, engine


WHOLE = Library("/lib/libcuda.so.1", 13000, ())
OLD = Library("/lib/libcuda.so.1", 12040, ("cuCheckpointProcessLock",))


def test_what_the_driver_allows_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shim.devices.driver_version", lambda: "550.1.2")
    monkeypatch.setattr("shim.criu_bridge.client.version", lambda criu: (4, 1, 1))
    assert held_against(WHOLE) == ([], "driver")
    (told,), engine = held_against(OLD, plugin_dir="/nowhere")
    assert engine == ""
    assert "lacks cuCheckpointProcessLock (needs driver r570 or later)" in told
    assert "/nowhere/cuda_plugin.so does not exist" in told
    assert told.endswith("(NVIDIA driver 550.1.2)")
    (tmp_path / "cuda_plugin.so").touch()
    (told,), engine = held_against(OLD, plugin_dir=str(tmp_path))
    assert engine == "plugin"
    assert "name NVIDIA's `cuda-checkpoint` as `cuda_checkpoint`" in told
    nvidias = {"plugin_dir": str(tmp_path), "cuda_checkpoint": "/usr/bin/cuda-checkpoint"}
    assert held_against(OLD, **nvidias) == ([], "plugin")


def test_a_node_without_a_driver_matters_to_who_has_the_device() -> None:
    assert held_against(None) == (["no libcuda.so.1 on this node"], "")
    assert held_against(None, devices=False) == ([], "")


def test_reasons_are_told_together() -> None:
    class Container:
        id = "c1"

    container: Any = Container()
    preflight._refuse(container, [], "it runs on")
    with pytest.raises(preflight.Refused, match=r"^container c1: refused: a; it runs on$"):
        preflight._refuse(container, ["a"], "it runs on")
    with pytest.raises(preflight.Refused, match=r"refused: \(1\) a; \(2\) b; it runs on$"):
        preflight._refuse(container, ["a", "b"], "it runs on")
