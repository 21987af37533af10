"""What a restore gives a container again that runc does not know of, and what it never gives."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from shim import injected
from shim.manifest import Manifest

GPU = {"uuid": "GPU-1", "name": "H200", "minor": "0"}
HOOK = "/usr/bin/nvidia-container-runtime-hook"


class Container:
    """What is asked of a container."""

    def __init__(self, bundle: Path) -> None:
        self.id = "c1"
        self.bundle = str(bundle)


def container(bundle: Path) -> Any:
    return Container(bundle)


def manifest(*mounts: dict[str, str], devices: tuple[str, ...] = ()) -> Manifest:
    return Manifest(
        container_id="c1",
        namespace="default",
        image="",
        runtime="",
        engine="driver",
        driver_version=None,
        gpus=[],
        criu_version="",
        kernel="",
        hostname="",
        options={},
        cuda_processes=[],
        phases={},
        mounts=list(mounts),
        devices=list(devices),
    )


def mount(path: str, **more: str) -> dict[str, str]:
    return {"destination": path, "path": path, **more}


@pytest.mark.parametrize(
    ("path", "drivers"),
    [
        ("/usr/lib/x86_64-linux-gnu/libcuda.so.580.159.04", True),
        ("/run/nvidia/driver/usr/lib/libnvidia-ml.so.580.159.04", True),
        ("/home/kubernetes/bin/nvidia/lib64/libcuda.so.1", True),
        ("/usr/lib/libnvcuvid.so.580", True),
        ("/lib/firmware/nvidia/580/gsp_ga10x.bin", True),
        ("/run/nvidia-persistenced/socket", True),
        ("/proc/driver/nvidia/gpus/0000:07:00.0", True),
        ("/dev/nvidia0", True),
        ("/dev/dri/card0", True),
        ("/etc/shadow", False),
        ("/usr/bin/python3", False),
        ("/home/nvidia/.ssh/id", False),
        ("/root/nvidia", False),
        ("/var/lib/kubelet/pods/1/volumes/nvidia", False),
        ("/usr/lib/kubelet/nvidia", False),
        ("/run/secrets/nvidia", False),
        ("/proc/driver/nvidiax", False),
        ("/proc/1/nvidia", False),
        ("", False),
    ],
)
def test_only_the_drivers_files_are_given(path: str, drivers: bool) -> None:
    assert injected._is_the_drivers(path) == drivers


def test_runc_knows_the_clients_mounts_and_criu_is_told_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(injected, "_is_the_drivers", lambda path: "libcuda" in path)
    library = tmp_path / "libcuda.so.580"
    library.touch()
    (tmp_path / "libcuda.so.1").symlink_to(library)
    made = manifest(
        mount("/etc/hosts", source="/var/lib/hosts"),
        {"destination": "/var/run/x", "path": "/run/x", "source": "/x"},
        mount("/lib/libcuda.so.1", source=str(tmp_path / "libcuda.so.1")),
        mount("/proc/driver/nvidia/params", text="ModifyDeviceFiles: 0\n"),
    )
    spec = {"mounts": [{"destination": "/etc/hosts/"}, {"destination": "/run/x"}]}
    lines = injected.give_again(container(tmp_path), made, spec, [])
    assert lines == [
        ("external", f"mnt[/lib/libcuda.so.1]:{library}"),
        ("external", f"mnt[/proc/driver/nvidia/params]:{tmp_path}/grit-mount-3"),
    ]
    kept = tmp_path / "grit-mount-3"
    assert kept.read_text() == "ModifyDeviceFiles: 0\n"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o444


def test_all_that_is_not_given_is_named(tmp_path: Path) -> None:
    made = manifest(
        mount("/a", source="/etc/shadow"),
        mount("/b", source="/usr/lib/libcuda.so.0.0.0"),
        mount("/c"),
    )
    with pytest.raises(injected.NotGiven) as caught:
        injected.give_again(container(tmp_path), made, {}, [])
    told = str(caught.value)
    assert "/a (was /etc/shadow of the host, none of the driver's)" in told
    assert "/b (was /usr/lib/libcuda.so.0.0.0, which this node does not have)" in told
    assert "/c (was / of the host" in told


def test_nvidias_hooks_are_left_out_and_others_are_not(tmp_path: Path) -> None:
    network = {"path": "/usr/bin/network", "args": ["network", "setkey"]}
    ctrs = {"path": "/usr/bin/containerd", "args": ["containerd", "oci-hook", "--", HOOK]}
    spec = {
        "hooks": {
            "prestart": [{"path": HOOK}, network],
            "createRuntime": [ctrs],
            "createContainer": [{"path": "/usr/bin/nvidia-ctk"}],  # runc runs none at a restore
        }
    }
    injected.give_again(container(tmp_path), manifest(), spec, [])
    assert spec["hooks"]["prestart"] == [network]
    assert spec["hooks"]["createRuntime"] == []
    assert len(spec["hooks"]["createContainer"]) == 1


def test_what_a_hook_would_have_allowed_is_allowed(tmp_path: Path) -> None:
    had = ("/dev/nvidia7", "/dev/null", "/dev/nothing", "/etc/passwd")
    rule = {"allow": True, "type": "c", "access": "rw", "major": 1, "minor": 3}
    spec: dict[str, Any] = {"linux": {"resources": {"devices": [{"allow": False}]}}}
    injected.give_again(container(tmp_path), manifest(devices=had), spec, [GPU])
    assert spec["linux"]["resources"]["devices"] == [{"allow": False}, rule]

    for given, devices in (([], []), ([GPU], [{"path": "/dev/nvidia0"}])):
        spec = {"linux": {"devices": devices}}  # given no GPU; or named by the specification
        injected.give_again(container(tmp_path), manifest(devices=had), spec, given)
        assert "resources" not in spec["linux"]


def test_mount_points_are_made_within_the_root(tmp_path: Path) -> None:
    rootfs = tmp_path / "rootfs"
    (rootfs / "etc").mkdir(parents=True)
    (rootfs / "etc/there").write_text("kept")
    (rootfs / "out").symlink_to("/../../outside")
    made = manifest(
        mount("/usr/lib/libcuda.so", source="/etc/hostname"),
        mount("/data", source="/usr"),
        mount("/etc/there", source="/etc/hostname"),
        mount("/out/file", source="/etc/hostname"),
        mount("/dev/nvidia0", source="/dev/null"),
        mount("/proc/driver/nvidia/params", text=""),
    )
    injected.make_mount_points(container(tmp_path), made)
    assert (rootfs / "usr/lib/libcuda.so").is_file()
    assert (rootfs / "data").is_dir()
    assert (rootfs / "etc/there").read_text() == "kept"
    assert (rootfs / "outside/file").is_file()
    assert not (rootfs / "dev").exists() and not (rootfs / "proc").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rootfs"]


def test_a_small_file_is_read_and_nothing_else(tmp_path: Path) -> None:
    small, large, link = tmp_path / "small", tmp_path / "large", tmp_path / "link"
    small.write_text("text")
    large.write_bytes(b"x" * (injected.LARGEST_FILE + 1))
    link.symlink_to(small)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff")
    assert injected._small_text(str(small)) == "text"
    for other in (large, link, binary, tmp_path, tmp_path / "none", Path("/dev/null")):
        assert injected._small_text(str(other)) is None
