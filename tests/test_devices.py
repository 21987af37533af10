"""Which GPU takes the place of which."""

from __future__ import annotations

from pathlib import Path

import pytest

from shim import devices
from shim.devices import DeviceError, successors


def gpu(number: int, name: str = "H200") -> dict[str, str]:
    return {"uuid": f"GPU-{number}", "name": name}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ([gpu(1)], [gpu(1)], ""),
        ([gpu(1)], [gpu(2), gpu(1)], ""),
        ([gpu(1)], [gpu(2)], "GPU-1=GPU-2"),
        ([gpu(1), gpu(2)], [gpu(3), gpu(2)], "GPU-2=GPU-2,GPU-1=GPU-3"),
        ([gpu(1), gpu(2, "L4")], [gpu(3, "L4"), gpu(4)], "GPU-1=GPU-4,GPU-2=GPU-3"),
        ([], [gpu(1)], ""),
        ([gpu(1)], [], ""),
    ],
)
def test_each_gpu_finds_its_successor(
    old: list[dict[str, str]], new: list[dict[str, str]], expected: str
) -> None:
    assert successors(old, new) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [([gpu(1)], [gpu(2, "L4")]), ([gpu(1), gpu(2)], [gpu(3)]), ([gpu(1), gpu(2)], [gpu(2)])],
)
def test_what_does_not_fit_is_refused_by_name(
    old: list[dict[str, str]], new: list[dict[str, str]]
) -> None:
    with pytest.raises(DeviceError, match="no GPU for the checkpoint's H200"):
        successors(old, new)


def test_the_users_map_goes_first_but_must_be_whole() -> None:
    assert successors([gpu(1)], [gpu(1)], "GPU-1=GPU-9") == "GPU-1=GPU-9"
    with pytest.raises(DeviceError, match="GPU-2"):
        successors([gpu(1), gpu(2)], [], "GPU-1=GPU-9")


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the kernel driver says of a node with two GPUs, in the form of r580."""
    monkeypatch.setattr(devices, "_PROC", str(tmp_path))
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build\n"
    )
    for minor, slot in ((1, "0000:07:00.0"), (0, "0000:08:00.0")):
        directory = tmp_path / "gpus" / slot
        directory.mkdir(parents=True)
        (directory / "information").write_text(
            f"Model: \t\t NVIDIA H200\nGPU UUID: \t GPU-{minor}\nDevice Minor: \t {minor}\n"
        )
    return tmp_path


def test_the_nodes_gpus_are_read_from_the_kernel_driver(driver: Path) -> None:
    assert devices.driver_version() == "580.159.04"
    assert devices.installed() == {
        0: {"uuid": "GPU-0", "name": "NVIDIA H200"},
        1: {"uuid": "GPU-1", "name": "NVIDIA H200"},
    }


def test_a_specification_names_its_gpus_by_device(driver: Path) -> None:
    paths = ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia1"]
    spec = {"linux": {"devices": [{"path": path} for path in paths]}}
    assert [one["uuid"] for one in devices.of_spec(spec)] == ["GPU-1"]
    assert devices.of_spec({}) == []


def test_a_node_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_PROC", "/nowhere")
    assert devices.driver_version() is None
    assert devices.installed() == {}
