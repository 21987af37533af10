"""CRI's own CheckpointContainer, which the kubelet's `/checkpoint/` endpoint calls, on 2.1:
archives of GPU containers, what tools read in them, and their restore as CRI has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from shim.sealed import MAGIC
from tests.e2e import gpu
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.services import ServiceError
from tests.e2e.test_encrypted import SETTINGS, give_key
from tests.nodes.image import build_image
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    Clean = Callable[[Kubelet], Kubelet]

IMAGE = "localhost:5000/local/busybox:1"
ARCHIVE = "/var/lib/kubelet/checkpoints/checkpoint-train_default-main.tar"


@pytest.fixture
def place(kubelet_forky: Kubelet, pulled: None, clean: Clean) -> Iterator[Kubelet]:
    yield clean(kubelet_forky)
    kubelet_forky.node.run(["rm", "-rf", "/var/lib/kubelet/checkpoints"])
    kubelet_forky.node.path(gpu.CONFIG).write_text("")


@pytest.fixture(scope="session")
def pulled(kubelet_forky: Kubelet) -> Iterator[None]:
    """An image that came by a pull: CRI's restore wants to pull it once more, by its digest."""
    node = kubelet_forky.node
    script = Path(__file__).with_name("registry.py").read_text()
    shutil.copy(build_image("local/busybox", "1", {}), node.path("/tmp/busybox.tar"))
    node.path("/tmp/registry.py").write_text(script)
    words = ["python3", "/tmp/registry.py", "/tmp/busybox.tar", "5000"]
    with node.popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == "serving\n"
        kubelet_forky.cri("PullImage", image={"image": IMAGE})
        yield
        process.kill()


def checkpoint(one: Pod, name: str = "main") -> None:
    """What the kubelet does for POST /checkpoint/default/POD/CONTAINER."""
    one.node.path(ARCHIVE).parent.mkdir(parents=True, exist_ok=True)
    one.kubelet.cri("CheckpointContainer", container_id=one.ids[name], location=ARCHIVE)


@pytest.mark.cell("CRI `CheckpointContainer`, and restore of its archive", node="forky")
@pytest.mark.parametrize("handler", ["grit", "grit-as-runc"])
def test_archive_and_restore(place: Kubelet, handler: str, engine: str) -> None:
    gpu.configure(place.node, engine=engine)
    one = place.gpu_pod("train", "main", "side", handler=handler, image=IMAGE).run()
    before = {name: one.next_report(name) for name in one.ids}
    checkpoint(one)
    for name in one.ids:
        gpu.go_on(before[name], one.next_report(name))
    assert place.board
    pid = place.node.host_pid(one.task_pids()["main"])
    assert place.board.library.state(pid) == (simgpu.SUCCESS, simgpu.RUNNING)
    assert place.node.path(ARCHIVE).stat().st_mode & 0o077 == 0
    with tarfile.open(place.node.path(ARCHIVE)) as tar:
        names = {name.removeprefix("./") for name in tar.getnames()}
        manifest = tar.extractfile("checkpoint/grit.json")
        assert manifest
        assert json.load(manifest)["engine"] == engine
    wanted = {"stats-dump", "dump.log", "config.dump", "spec.dump", "rootfs-diff.tar"}
    assert wanted <= names
    assert "checkpoint/inventory.img" in names
    one.remove()

    again = place.gpu_pod("train", handler=handler, image=ARCHIVE).run()
    gpu.go_on(before["main"], again.next_report())
    counts = [report.counter for report in again.reports()]
    assert counts == list(range(len(counts)))


def test_checkpointctl_reads_it(place: Kubelet) -> None:
    one = place.gpu_pod("train").run()
    one.next_report()
    checkpoint(one)
    node = place.node
    shown = node.run(["checkpointctl", "show", ARCHIVE]).stdout
    assert "main" in shown and gpu.IMAGE in shown and "containerd" in shown
    tree = json.loads(
        node.run(["checkpointctl", "inspect", "--all", "--format=json", ARCHIVE], cwd="/tmp").stdout
    )
    assert "simgpu-workload" in json.dumps(tree)


def test_memory_that_does_not_fit(place: Kubelet) -> None:
    """A refusal reaches the kubelet with its reason; the container runs on, no archive is left."""
    one = place.gpu_pod("train").run()
    before = one.next_report()
    assert place.board
    with place.board.faulty("checkpoint=2"), pytest.raises(ServiceError, match=r"pid .*copied"):
        checkpoint(one)
    assert not place.node.path(ARCHIVE).exists()
    gpu.go_on(before, one.next_report())
    assert one.status("main").state == kubelets.RUNNING


def test_encrypted_archive_and_restore(place: Kubelet) -> None:
    """What CRI packs and unpacks is the encrypted files."""
    key = give_key(place.node)
    gpu.configure(place.node, **SETTINGS)
    one = place.gpu_pod("train", image=IMAGE).run()
    before = one.next_report()
    checkpoint(one)
    gpu.go_on(before, one.next_report())
    with tarfile.open(place.node.path(ARCHIVE)) as tar:
        inventory = tar.extractfile("checkpoint/inventory.img")
        assert inventory
        assert inventory.read().startswith(MAGIC)
    one.remove()
    key.write_text("cd" * 32)
    with pytest.raises(ServiceError, match="name it in old_encryption_keys"):
        place.gpu_pod("train", image=ARCHIVE).run()
    key.write_text("ab" * 32)
    gpu.go_on(before, place.gpu_pod("again", image=ARCHIVE).run().next_report())
    assert not list(place.node.path(kubelets.TASKS).glob("*/.grit-partial-*"))
