"""Which GPU takes the place of which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shim import devices
from shim.devices import DeviceError, successors


def gpu(number: int, name: str = "H200") -> dict[str, str]:
    return {"uuid": f"GPU-{number}", "name": name}


def allow(*paths: str) -> dict[str, Any]:
    """A specification with these devices."""
    return {"linux": {"devices": [{"path": path} for path in paths]}}


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


def test_a_gpu_without_room_is_not_taken() -> None:
    held, free = {"GPU-1": 40, "GPU-2": 10}, {"GPU-3": 20, "GPU-4": 40}
    pairs = successors([gpu(2), gpu(1)], [gpu(3), gpu(4)], held=held, free=free)
    assert pairs == "GPU-1=GPU-4,GPU-2=GPU-3"
    with pytest.raises(DeviceError) as caught:
        successors([gpu(1)], [gpu(3)], held={"GPU-1": 40 << 20}, free={"GPU-3": 3 << 20})
    assert "H200 (GPU-3) has 3 MiB free, 40 MiB are needed" in str(caught.value)


def test_the_same_gpu_is_left_for_another_if_it_has_no_room() -> None:
    held, free = {"GPU-1": 40 << 20}, {"GPU-1": 3 << 20, "GPU-2": 50 << 20}
    assert successors([gpu(1)], [gpu(1), gpu(2)], held=held, free=free) == "GPU-1=GPU-2"
    with pytest.raises(DeviceError, match=r"\(GPU-1\) has 3 MiB free, 40 MiB are needed"):
        successors([gpu(1)], [gpu(1)], held=held, free=free)


def test_the_users_map_goes_first_but_must_be_whole() -> None:
    assert successors([gpu(1)], [gpu(1), gpu(9)], "GPU-1=GPU-9") == "GPU-1=GPU-9"
    assert successors([gpu(1)], [], "GPU-1=GPU-9") == "GPU-1=GPU-9"
    assert successors([], [gpu(9)], "GPU-1=GPU-9") == "GPU-1=GPU-9"


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("GPU-1=GPU-3", "names no successor for GPU-2"),
        ("GPU-1=GPU-3,GPU-2=GPU-3", "names a GPU as the successor of two"),
        ("GPU-1=GPU-3,GPU-2", "is not OLD=NEW"),
        ("GPU-1=GPU-3,GPU-1=GPU-4", "is not OLD=NEW"),
        ("GPU-1=GPU-3,GPU-2=GPU-8", r"was not given GPU-8, but H200 \(GPU-3\)"),
        ("GPU-1=GPU-3,GPU-2=GPU-5", r"GPU-5, for H200 \(GPU-2\), is another type \(L4\)"),
        ("GPU-1=GPU-4,GPU-2=GPU-3", r"GPU-4, for H200 \(GPU-1\), has 0 MiB free, 1 MiB are"),
    ],
)
def test_a_map_of_the_users_that_does_not_fit_is_refused(named: str, why: str) -> None:
    old, new = [gpu(1), gpu(2)], [gpu(3), gpu(4), gpu(5, "L4")]
    with pytest.raises(DeviceError, match=why):
        successors(old, new, named, held={"GPU-1": 1 << 20}, free={"GPU-4": 0})


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
        0: {"uuid": "GPU-0", "name": "NVIDIA H200", "minor": "0"},
        1: {"uuid": "GPU-1", "name": "NVIDIA H200", "minor": "1"},
    }


def test_a_specification_names_its_gpus_by_device(driver: Path) -> None:
    spec = allow("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia1")
    assert [one["uuid"] for one in devices.of_spec(spec)] == ["GPU-1"]
    assert devices.of_spec({}) == []
    assert devices.named_in(spec)
    assert devices.named_in(allow("/dev/nvidiactl"))
    assert not devices.named_in(allow("/dev/fuse"))


@pytest.mark.parametrize(
    ("visible", "given"),
    [
        ("all", ["GPU-1", "GPU-0"]),
        ("0", ["GPU-1"]),  # by the PCI bus, as NVML counts
        ("1,0", ["GPU-0", "GPU-1"]),
        ("GPU-0", ["GPU-0"]),
        ("7,GPU-7", []),
        ("none", []),
        ("void", []),
        ("", []),
    ],
)
def test_what_nvidias_runtime_gives_goes_by_the_environment(
    driver: Path, visible: str, given: list[str]
) -> None:
    spec: dict[str, Any] = {"process": {"env": [f"NVIDIA_VISIBLE_DEVICES={visible}"]}}
    runtime = "/usr/bin/nvidia-container-runtime"
    assert [one["uuid"] for one in devices.of_spec(spec, runtime)] == given
    assert devices.of_spec(spec, "/usr/bin/runc") == []  # images bring that variable, too
    spec["hooks"] = {"prestart": [{"path": "/usr/bin/nvidia-container-runtime-hook"}]}
    assert [one["uuid"] for one in devices.of_spec(spec)] == given


def test_ctrs_gpus_are_an_argument_of_its_hook(driver: Path) -> None:
    words = ["containerd", "oci-hook", "--", "nvidia-container-cli", "configure", "--device=1"]
    hook = {"path": "/usr/bin/containerd", "args": words}
    spec = {"hooks": {"createRuntime": [hook]}}
    assert [one["uuid"] for one in devices.of_spec(spec)] == ["GPU-0"]


def test_device_files_are_listed_as_the_container_has_them(tmp_path: Path) -> None:
    (tmp_path / "nvidia-caps").mkdir()
    for name in ("nvidia0", "nvidiactl", "null", "nvidia-caps/nvidia-cap21"):
        (tmp_path / name).touch()
    assert devices.nodes(str(tmp_path)) == [
        "/dev/nvidia0",
        "/dev/nvidiactl",
        "/dev/nvidia-caps/nvidia-cap21",
    ]
    assert devices.nodes("/nowhere") == []
    assert [devices.number(p) for p in ("/dev/nvidia12", "/dev/nvidiactl")] == [12, None]


def test_a_node_without_the_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_PROC", "/nowhere")
    assert devices.driver_version() is None
    assert devices.installed() == {}
