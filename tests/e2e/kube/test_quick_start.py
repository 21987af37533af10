"""GRIT's quick start on two nodes, from `kubectl apply` of a Checkpoint to the job elsewhere:
real containerd 1.7 and 2.1, real agents, one store between them; the GPU is simulated."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.kube.workers import STORE, Worker, checkpoint, ended, two, why

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.kube.control_plane import ControlPlane


@pytest.fixture(scope="module")
def workers(
    resources: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, Worker]]:
    settings = "lease_seconds = 5\npod_wait_seconds = 3\n"
    with two(resources, tmp_path_factory.mktemp("store"), settings) as both:
        yield both


def test_checkpoint_and_restore_on_the_other_node(
    resources: ControlPlane, workers: tuple[Worker, Worker]
) -> None:
    plane, (a, b) = resources, workers
    pod = a.kubelet.gpu_pod("train", "main", "side").run()
    before = {name: pod.next_report(name) for name in pod.ids}
    words = plane.command("get", "checkpoint", "--watch")
    watch = plane.node.popen(words, stdout=subprocess.PIPE)
    try:
        # Two for one pod: both are made, one after the other.
        checkpoint(plane, "demo", "train")
        checkpoint(plane, "again", "train")
        one = ended(plane, workers, "demo", "Checkpointed")
        ended(plane, workers, "again", "Checkpointed")
    finally:
        watch.kill()
        shown, _ = watch.communicate()
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["NAME", "PHASE", "POD"]
    assert ["demo", "Checkpointing", "train"] in rows
    assert ["demo", "Checkpointed", "train"] in rows
    assert one["status"]["nodeName"] == "node-a"
    assert one["status"]["dataPath"] == f"{STORE}/default/demo"
    assert why(one).startswith("True ")
    for name in pod.ids:
        pod.next_report(name)  # it runs on
    b.node.run(["/usr/local/bin/gritctl", "verify", "--no-node", f"{STORE}/default/demo/main"])

    pod.remove()
    notes = {"grit.dev/checkpoint": one["status"]["dataPath"]}
    successor = b.kubelet.gpu_pod("train-2", "main", "side", annotations=notes).run()
    for name in successor.ids:
        gpu.go_on(before[name], successor.next_report(name))
    successor.remove()

    # A deleted one takes its files along.
    store = a.node.path(f"{STORE}/default")
    plane.kubectl("delete", "checkpoint", "demo", "again", "--timeout=60s")
    assert [entry.name for entry in store.iterdir()] == [] if store.exists() else True
