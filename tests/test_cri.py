"""What is read of CRI's annotations, and where the log and the volumes of a pod are."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from shim import cri, pod, uts, volumes

if TYPE_CHECKING:
    from pathlib import Path

SANDBOX = "5a"


def notes(**more: str) -> dict[str, str]:
    words = {"container_type": "container", "container_name": "main", "sandbox_id": SANDBOX, **more}
    return {f"io.kubernetes.cri.{key.replace('_', '-')}": value for key, value in words.items()}


@pytest.fixture
def bundles(tmp_path: Path) -> Path:
    """Bundles of a sandbox, whose pod logs below tmp_path/logs, and of a container."""
    for name in (SANDBOX, "c1"):
        (tmp_path / name).mkdir()
    spec = {"annotations": notes(sandbox_log_directory=str(tmp_path / "logs"))}
    (tmp_path / SANDBOX / "config.json").write_text(json.dumps(spec))
    return tmp_path


def test_sandbox() -> None:
    assert cri.is_sandbox(notes(container_type="sandbox"))
    assert not cri.is_sandbox(notes())
    assert not cri.is_sandbox({})


def test_log_is_that_of_the_newest_attempt(bundles: Path) -> None:
    container = str(bundles / "c1")
    assert cri.log_file(container, notes()) is None  # no directory yet
    logs = bundles / "logs/main"
    logs.mkdir(parents=True)
    assert cri.log_file(container, notes()) is None
    for name in ("0.log", "9.log", "10.log", "11.log.20261125", "x.log"):
        (logs / name).touch()
    assert cri.log_file(container, notes()) == str(logs / "10.log")
    assert cri.log_file(container, {}) is None
    (bundles / SANDBOX / "config.json").unlink()
    assert cri.log_file(container, notes()) is None


def mount(destination: str, source: str) -> dict[str, Any]:
    return {"destination": destination, "source": source, "type": "bind"}


def test_only_volumes_that_the_pod_takes_with_it() -> None:
    empty = "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/scratch"
    shm = f"/run/containerd/io.containerd.grpc.v1.cri/sandboxes/{SANDBOX}/shm"
    spec = {
        "annotations": notes(),
        "mounts": [
            mount("/dev/shm", shm),
            mount("/scratch", empty),
            mount("/data", "/srv/data"),
            mount("/token", "/var/lib/kubelet/pods/u1/volumes/kubernetes.io~projected/token"),
            {"destination": "/proc", "type": "proc"},
        ],
    }
    assert volumes.of(spec) == {"/dev/shm": shm, "/scratch": empty}
    assert volumes.of({"mounts": [mount("/dev/shm", "/dev/shm")]}) == {}  # the host's
    assert volumes.of({}) == {}


def test_volumes_there_and_back(tmp_path: Path) -> None:
    old, new, images = (tmp_path / name for name in ("old", "new", "images"))
    for folder in (old, new, images):
        folder.mkdir()
    parts = "volumes/kubernetes.io~empty-dir/scratch"
    (old / parts).mkdir(parents=True)
    (new / parts).mkdir(parents=True)
    (old / parts / "a").write_text("kept")
    (old / parts / "a").chmod(0o640)
    volumes.save({"mounts": [mount("/scratch", str(old / parts))]}, str(images), 60)
    assert [entry.name for entry in images.iterdir()] == ["volume-%2Fscratch.tar"]
    filled: set[str] = set()
    spec = {"mounts": [mount("/scratch", str(new / parts))]}
    volumes.put_back(spec, str(images), filled, (0, 0))
    assert (new / parts / "a").read_text() == "kept"
    assert (new / parts / "a").stat().st_mode & 0o777 == 0o640
    (new / parts / "a").write_text("newer")
    volumes.put_back(spec, str(images), filled, (0, 0))  # the pod's next container
    assert (new / parts / "a").read_text() == "newer"


def test_a_volume_that_cannot_be_saved(tmp_path: Path) -> None:
    source = tmp_path / "volumes/kubernetes.io~empty-dir/scratch"
    source.mkdir(parents=True)
    (source / "a").touch()
    with pytest.raises(volumes.VolumeError, match=r"/scratch .* was not saved: .*tar: "):
        volumes.save({"mounts": [mount("/scratch", str(source))]}, str(tmp_path / "no"), 60)


def test_together() -> None:
    assert pod.together({"annotations": {"grit.dev/together": "true"}})
    assert not pod.together({"annotations": {"grit.dev/together": "false"}})
    assert not pod.together({"annotations": None})
    of_sandbox = notes(container_type="sandbox") | {"grit.dev/together": "true"}
    assert not pod.together({"annotations": of_sandbox})
    with pytest.raises(ValueError, match='is "1"; it must be "true" or "false"'):
        pod.together({"annotations": {"grit.dev/together": "1"}})


def test_names_that_a_container_is_to_have() -> None:
    here = {"linux": {"namespaces": [{"type": "uts", "path": "/proc/self/ns/uts"}]}}
    assert uts.wanted({**here, "hostname": "other"})["hostname"] != "other"
    own = {"linux": {"namespaces": [{"type": "uts"}]}}
    assert uts.wanted({**own, "hostname": "own"}) == {"hostname": "own"}
    assert uts.wanted(own) == {}
    assert uts.wanted({"hostname": "nodes", "linux": {"namespaces": []}}) == {}  # the node's
