"""GRIT's quick start, steps 3 to 5, on a real GPU: a Checkpoint and a Restore by kubectl, the pod
made and removed as a kubelet does."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu import kube
from tests.gpu.conftest import HOME, TMPFS
from tests.gpu.job import reports, same, until
from tests.gpu.kube import reported
from tests.gpu.machine import gpu_devices

if TYPE_CHECKING:
    from tests.e2e.kube.control_plane import ControlPlane
    from tests.gpu.machine import Machine
    from tests.gpu.results import Results

TRAIN = {"app": "train"}


def in_phase(plane: ControlPlane, kind: str, phase: str, log: Path) -> dict[str, Any]:
    """The resource `demo`, once it has come to that phase."""
    wait = ["wait", f"--for=jsonpath={{.status.phase}}={phase}", "--timeout=100s", f"{kind}/demo"]
    waited = plane.kubectl(*wait, check=False)
    one: dict[str, Any] = plane.get(kind, "demo")
    assert waited.returncode == 0, [waited.stderr, one.get("status"), log.read_text()[-4000:]]
    return one


@pytest.mark.timeout(500)
def test_the_quick_start(machine: Machine, results: Results, criu: str, images: str) -> None:
    machine.configure()
    store = TMPFS / "store"
    store.mkdir()
    log = results.directory / "agent.log"
    shared = HOME / "shared/kube"
    argv, mounts = kube.workload(shared, "hold.py", "512")
    status = shared / "status"
    with (
        kube.HostPlane(machine) as plane,
        kube.kubelet_on(machine) as kubelet,
        kube.agent_on(machine, store, log),
    ):
        plane.apply_packaged()
        given = kube.given(machine, gpu_devices())
        pod_of = functools.partial(kube.HostPod, kubelet, given=given, labels=TRAIN, mounts=mounts)
        pod = pod_of("train", {"main": argv}).run()
        before = reported(status, pod)
        began = time.monotonic()
        plane.apply((kube.EXAMPLES / "checkpoint.yaml").read_text())
        saved = in_phase(plane, "checkpoint", "Checkpointed", log)
        checkpoint = time.monotonic() - began
        same(before, reported(status, pod))  # it runs on
        kube.gritctl(machine, "verify", "--no-node", saved["status"]["dataPath"])
        pod.remove()

        plane.apply((kube.EXAMPLES / "restore.yaml").read_text())
        intents = Path("/run/containerd/grit-intents")
        until("a pending Restore on the node", lambda: list(intents.glob("*.pending")))
        began = time.monotonic()
        successor = pod_of("train-2", {"main": argv}).run()
        after = reported(status, successor)
        restored = in_phase(plane, "restore", "Restored", log)
        restore = time.monotonic() - began
        assert reports(status)[-1]["pid"] == before["pid"]
        same(before, after)
        # From its state, not from its start: then it would have counted from 1 again.
        counters = [line["counter"] for line in reports(status)]
        assert counters.count(1) == 1
        successor.remove()
    results.finding(
        "the quick start by kubectl",
        checkpoint=saved["status"]["phase"],
        seconds_from_apply_to_Checkpointed=f"{checkpoint:.2f}",
        restore=restored["status"]["phase"],
        seconds_from_the_pod_to_Restored=f"{restore:.2f}",
        device_sum=after["sum"],
        ballast_sum=after["ballast"],
    )
