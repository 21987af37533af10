"""A pod checkpointed on one node and restored on another, with its own containerd, file systems,
network and names; also from containerd 1.7 to 2.1. What does not fit is refused at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods.conftest import kubelet_on
from tests.e2e.pods.services import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    Clean = Callable[[Kubelet], Kubelet]

DIRECTORY = "/var/lib/grit/default/moved"
NOTES = {"grit.dev/checkpoint": DIRECTORY, "grit.dev/restore-name": "moved"}
H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="session")
def kubelet_b() -> Iterator[Kubelet]:
    """Node B: another forky with its own pod network."""
    with kubelet_on("forky", subnet=2) as kubelet:
        yield kubelet


@pytest.fixture(params=["13", "forky"])
def kubelet_a(request: pytest.FixtureRequest) -> Kubelet:
    """Node A: containerd 1.7, and 2.1 as B."""
    kubelet: Kubelet = request.getfixturevalue(f"kubelet_{request.param}")
    return kubelet


@pytest.fixture
def places(kubelet_a: Kubelet, kubelet_b: Kubelet, clean: Clean) -> Iterator[list[Kubelet]]:
    both = [clean(kubelet_a), clean(kubelet_b)]
    yield both
    for kubelet in both:
        kubelet.node.run(["rm", "-rf", DIRECTORY])
        kubelet.node.path(gpu.CONFIG).write_text("")


def moved(one: Pod, to: Kubelet) -> None:
    """Saves the pod on its node, ends it there, and brings what was saved to the other."""
    agent.checkpoint_pod(one, DIRECTORY)
    one.remove()
    agent.transfer(one.node, to.node, DIRECTORY)


def start_refused(kubelet: Kubelet, **options: Any) -> str:
    """Why the pod's container is not started; nothing of it runs or is left."""
    one = kubelet.gpu_pod("train", annotations=NOTES, **options).run_sandbox()
    one.create("main")
    processes = kubelet.node.processes().keys()
    with pytest.raises(ServiceError) as told:
        one.start("main")
    gpu.until("nothing new", lambda: kubelet.node.processes().keys() <= processes)
    assert kubelet.board
    assert kubelet.board.owners() == {}
    return str(told.value)


def rewrite(kubelet: Kubelet, **changes: Any) -> None:
    """Makes the manifest on a node tell of another machine."""
    path = kubelet.node.path(f"{DIRECTORY}/main/checkpoint/grit.json")
    written = {**json.loads(path.read_text()), **changes}
    del written["self_check"], written["sha256_of_the_above"]  # as a change by hand must
    path.write_text(json.dumps(written))


def test_to_another_node(places: list[Kubelet], engine: str) -> None:
    a, b = places
    for kubelet in places:
        gpu.configure(kubelet.node, engine=engine)
    one = a.gpu_pod("train", "main", "side").run()
    before = {name: one.next_report(name) for name in one.ids}
    old_ip = one.ip()
    moved(one, b)
    again = b.gpu_pod("train-2", "main", "side", annotations=NOTES).run()
    for name in again.ids:
        gpu.go_on(before[name], again.next_report(name))
        counts = [report.counter for report in again.reports(name)]
        assert counts == list(range(len(counts)))  # the file system came along
    assert (old_ip.rsplit(".", 1)[0], again.ip().rsplit(".", 1)[0]) == ("10.88.1", "10.88.2")
    assert again.ip() in again.shell("main", "ip -4 -o addr show eth0")
    assert again.shell("main", "hostname; cat /etc/hostname").split() == ["train-2", "train-2"]
    pid = again.task_pids()["main"]
    groups = again.node.path(f"/proc/{pid}/cgroup").read_text()
    assert f"/kubepods/pod{again.uid}/" in groups
    assert one.uid not in groups
    device = again.node.path("/dev/nvidia0").stat().st_rdev
    assert again.node.path(f"/proc/{pid}/root/dev/nvidia0").stat().st_rdev == device
    assert a.board and a.board.owners() == {}


@pytest.mark.parametrize("tcp", ["established", "close"])
def test_tcp_connections(
    kubelet_forky: Kubelet, kubelet_b: Kubelet, clean: Clean, tcp: str
) -> None:
    """Kept with their state, or closed for the process to find out; CRIU 4.1 on 13 cannot dump any
    socket on current kernels."""
    a, b = clean(kubelet_forky), clean(kubelet_b)
    try:
        for kubelet in (a, b):
            gpu.configure(kubelet.node, tcp=tcp)
        one = a.gpu_pod("talk", words=["--tcp"]).run()
        before = one.next_report()
        assert before.tcp
        moved(one, b)
        again = b.gpu_pod("talk", words=["--tcp"], annotations=NOTES).run()
        seen = len(again.reports())  # those of its first life among them
        gpu.until("a report", lambda: len(again.reports()) > seen + 1)
        last = again.reports()[-1]
        assert (last.device, last.cpu, last.file) == (before.device, before.cpu, before.file)
        assert last.tcp == (tcp == "established")
    finally:
        for kubelet in (a, b):
            kubelet.node.run(["rm", "-rf", DIRECTORY])
            kubelet.node.path(gpu.CONFIG).write_text("")


def test_refused_for_cpu_kernel_and_driver(places: list[Kubelet]) -> None:
    a, b = places
    one = a.gpu_pod("train").run()
    one.next_report()
    moved(one, b)
    path = b.node.path(f"{DIRECTORY}/main/checkpoint/grit.json")
    cpu = json.loads(path.read_text())["cpu"]
    more = {**cpu, "instructions": cpu["instructions"] + " amx_tile"}
    rewrite(b, cpu=more, kernel="99.1.0", driver="580.95.05")
    told = start_refused(b)
    assert "lacks amx_tile" in told
    assert "older than theirs (99.1.0)" in told
    assert "there is no NVIDIA driver, and they have that of 580.95.05 mapped" in told
    assert "Nothing was started" in told
    gpu.configure(b.node, on_mismatch="warn")
    again = b.gpu_pod("train", annotations=NOTES).run()
    again.next_report()


def test_refused_for_mounts(places: list[Kubelet]) -> None:
    a, b = places
    for kubelet in places:
        kubelet.node.path("/srv/data").mkdir(parents=True, exist_ok=True)
    one = a.gpu_pod("train", mounts={"/data": "/srv/data"}).run()
    one.next_report()
    moved(one, b)
    assert "had mounts that this one is not given: /data" in start_refused(b)
    b.gpu_pod("train", annotations=NOTES, mounts={"/data": "/srv/data"}).run().next_report()


def test_refused_for_the_type_of_gpu() -> None:
    """On two nodes that tell of their GPUs as NVIDIA's driver does."""
    with kubelet_on("forky", subnet=3) as a, kubelet_on("forky", subnet=4) as b:
        _pretend(a, H100)
        _pretend(b, "NVIDIA A100-SXM4-80GB")
        one = a.gpu_pod("train").run()
        one.next_report()
        moved(one, b)
        told = start_refused(b)
        assert f"no GPU for the checkpoint's {H100}" in told
        assert "NVIDIA A100-SXM4-80GB (GPU-a100) is another type" in told


def _pretend(kubelet: Kubelet, model: str) -> None:
    node = kubelet.node
    node.run(["busybox", "mount", "-t", "tmpfs", "none", "/proc/driver"])
    folder = node.path("/proc/driver/nvidia/gpus/0000:01:00.0")
    folder.mkdir(parents=True)
    uuid = f"GPU-{model[7:11].lower()}"
    text = f"Model: \t {model}\nGPU UUID: \t {uuid}\nDevice Minor: \t 0\n"
    (folder / "information").write_text(text)
