"""GRIT's quick start on two nodes, from `kubectl apply` of a Checkpoint to the job elsewhere:
real containerd 1.7 and 2.1, real agents, one store between them; the GPU is simulated."""

from __future__ import annotations

import contextlib
import json
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import gpu
from tests.e2e.kube.control_plane import KUBECONFIG
from tests.e2e.pods.conftest import kubelet_on
from tests.nodes import agent_packages
from tests.nodes.installed import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.kube.control_plane import ControlPlane
    from tests.e2e.pods.kubelet import Kubelet
    from tests.nodes.node import Process

STORE = "/mnt/ckpt-store"
PACKAGES = "/usr/local/lib/agent-packages"
SETTINGS = f"""\
lease_seconds = 5
pod_wait_seconds = 3
[stores]
ckpt-store = "{STORE}"
"""


class Worker:
    """A node of the cluster: the kubelet's part, and the agent."""

    def __init__(self, kubelet: Kubelet, name: str, plane: ControlPlane) -> None:
        self.kubelet = kubelet
        self.node = kubelet.node
        self.name = name
        plane.join(self.node)
        self.node.path("/etc/grit").mkdir(exist_ok=True)
        self.node.path("/etc/grit/agent.toml").write_text(SETTINGS)
        self._agent: Process | None = None

    def start_agent(self) -> None:
        words = ["-m", "shim.agent", "--node", self.name, "--kubeconfig", KUBECONFIG]
        with open(self.node.path("/var/log/grit-agent.log"), "ab") as log:
            self._agent = self.node.popen(
                [f"{ENVIRONMENT}/bin/python", *words],
                env={"PYTHONPATH": PACKAGES},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill_agent(self) -> None:
        assert self._agent
        self._agent.kill()
        self._agent.wait(30)

    def log(self) -> str:
        return self.node.path("/var/log/grit-agent.log").read_text()[-4000:]


@pytest.fixture(scope="module")
def workers(
    resources: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Worker]]:
    store: Path = tmp_path_factory.mktemp("store")
    shares = {STORE: store}
    with contextlib.ExitStack() as stack:
        a, b = (
            stack.enter_context(
                kubelet_on(
                    name,
                    subnet=subnet,
                    shares=shares,
                    binds={**gpu.kit_binds(), PACKAGES: agent_packages.directory(name)},
                )
            )
            for subnet, name in enumerate(("13", "forky"), 1)
        )
        both = [Worker(a, "node-a", resources), Worker(b, "node-b", resources)]
        for worker in both:
            worker.start_agent()
        yield both
        for worker in both:
            worker.kill_agent()


def checkpoint(plane: ControlPlane, name: str, pod: str, **spec: Any) -> None:
    spec = {"podName": pod, "volumeClaim": {"claimName": "ckpt-store"}, **spec}
    manifest = {
        "apiVersion": "kaito.sh/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }
    plane.apply(json.dumps(manifest))


def ended(plane: ControlPlane, workers: list[Worker], name: str, phase: str) -> dict[str, Any]:
    """The Checkpoint once its phase is `phase`; if it ends otherwise, all that is known."""

    def look() -> dict[str, Any] | None:
        one: dict[str, Any] = plane.get("checkpoint", name)
        now = one.get("status", {}).get("phase")
        if now in ("Checkpointed", "Failed") and now != phase:
            raise AssertionError([one["status"], *(worker.log() for worker in workers)])
        return one if now == phase else None

    try:
        found = gpu.until(f"{name}: {phase}", look, 90)
    except AssertionError as error:
        raise AssertionError([str(error), *(worker.log() for worker in workers)]) from None
    assert found
    return found


def why(one: dict[str, Any]) -> str:
    (condition,) = [c for c in one["status"]["conditions"] if c["type"] == "Checkpointed"]
    return f"{condition['status']} {condition['reason']}: {condition['message']}"


def test_checkpoint_and_restore_on_the_other_node(
    resources: ControlPlane, workers: list[Worker]
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
