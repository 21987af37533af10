"""Restore resources on two nodes: the quick start as written, from the Checkpoint of a pod on the
one to its successor on the other; which pods are meant and which are not; what fails and says so.
Real containerd 1.7 and 2.1, real agents, one store between them; the GPU is simulated."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from tests.e2e import gpu
from tests.e2e.kube import control_plane, workers
from tests.e2e.kube.control_plane import KUBECONFIG
from tests.e2e.kube.workers import STORE, checkpoint
from tests.e2e.pods.services import ServiceError
from tests.nodes.installed import ENVIRONMENT, REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.kube.control_plane import ControlPlane
    from tests.e2e.kube.workers import Worker
    from tests.e2e.pods.kubelet import Pod
    from tests.nodes.node import Process
    from tests.simgpu.simgpu import Report

EXAMPLES = REPOSITORY / "packaging/kubernetes/examples"
SETTINGS = "pod_wait_seconds = 3\n"
PATIENT = {"agent_timeout": 60}
"""For a busy machine; a kubelet would try again."""
TRAIN = {"app": "train"}


@pytest.fixture(scope="module")
def both(
    resources: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, Worker]]:
    with workers.two(resources, tmp_path_factory.mktemp("store"), SETTINGS) as both:
        for worker in both:
            gpu.configure(worker.node, **PATIENT)
        yield both


@pytest.fixture
def clean(resources: ControlPlane, both: tuple[Worker, Worker]) -> Iterator[ControlPlane]:
    """The control plane; at the test's end no resource and no pod is left of it."""
    yield resources
    for kind in ("restore", "checkpoint"):
        resources.kubectl("delete", kind, "--all", "--timeout=60s")
    for worker in both:
        for pod in worker.kubelet.made:
            pod.remove()
        worker.kubelet.made.clear()


def restore(plane: ControlPlane, name: str, labels: dict[str, str], checkpoint: str) -> None:
    manifest = {
        "apiVersion": "kaito.sh/v1alpha1",
        "kind": "Restore",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"checkpointName": checkpoint, "selector": {"matchLabels": labels}},
    }
    plane.apply(json.dumps(manifest))


def in_phase(
    plane: ControlPlane, kind: str, name: str, phase: str, both: tuple[Worker, ...]
) -> dict[str, Any]:
    """The resource, once it has come to that phase."""
    wait = ["wait", f"--for=jsonpath={{.status.phase}}={phase}", "--timeout=50s"]
    waited = plane.kubectl(*wait, f"{kind}/{name}", check=False)
    one: dict[str, Any] = plane.get(kind, name)
    if waited.returncode:
        raise AssertionError([waited.stderr, one.get("status"), *(each.log() for each in both)])
    return one


def pending_on(worker: Worker) -> None:
    """Until the node's agent has told its shims that a Restore is pending."""
    place = worker.node.path("/run/containerd/grit-intents")
    gpu.until("a pending Restore on the node", lambda: list(place.glob("*.pending")))


def why(one: dict[str, Any]) -> str:
    (condition,) = [c for c in one["status"]["conditions"] if c["type"] == "Restored"]
    return f"{condition['status']} {condition['reason']}: {condition['message']}"


def saved(
    plane: ControlPlane, both: tuple[Worker, Worker], name: str, *containers: str
) -> dict[str, Report]:
    """What a pod's containers said before a Checkpoint of that name was made, and the pod removed
    from the first node."""
    pod = both[0].kubelet.gpu_pod("train", *containers, labels=TRAIN).run()
    before = {container: pod.next_report(container) for container in pod.ids}
    checkpoint(plane, name, "train")
    in_phase(plane, "checkpoint", name, "Checkpointed", both)
    pod.remove()
    return before


def fresh(pod: Pod, before: dict[str, Report]) -> bool:
    """Whether the containers began anew: a restored one has the file of its first life."""
    return all(_began(pod, name) > before[name].time for name in pod.ids)


def _began(pod: Pod, name: str) -> float:
    pod.next_report(name)
    return pod.reports(name)[0].time


def going_on(pod: Pod, before: dict[str, Report]) -> bool:
    for name in pod.ids:
        gpu.go_on(before[name], pod.next_report(name))
    return not any(_began(pod, name) > before[name].time for name in pod.ids)


def asked(plane: ControlPlane) -> set[tuple[str, str]]:
    """What the agents have asked of the API server: verbs and resources."""
    found = set()
    for event in plane.audit(control_plane.AGENT):
        about = event.get("objectRef", {})
        if about.get("apiGroup") == "kaito.sh":
            names = filter(None, (about["resource"], about.get("subresource")))
            found.add((event["verb"], "/".join(names)))
    return found


def allowed() -> set[tuple[str, str]]:
    """What the packaged role lets them."""
    return {
        (verb, resource)
        for rule in control_plane.granted()
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }


def test_the_quick_start_as_written(clean: ControlPlane, both: tuple[Worker, Worker]) -> None:
    plane, (a, b) = clean, both
    pod = a.kubelet.gpu_pod("train", "main", "side", labels=TRAIN).run()
    before = {name: pod.next_report(name) for name in pod.ids}
    plane.apply((EXAMPLES / "checkpoint.yaml").read_text())
    one = in_phase(plane, "checkpoint", "demo", "Checkpointed", both)
    verify = ["/usr/local/bin/gritctl", "verify", "--no-node", one["status"]["dataPath"]]
    b.node.run(verify)
    pod.remove()

    watch = plane.node.popen(plane.command("get", "restore", "--watch"), stdout=subprocess.PIPE)
    plane.apply((EXAMPLES / "restore.yaml").read_text())
    pending_on(b)
    # Another job of the namespace is asked about, and is not meant.
    other = b.kubelet.gpu_pod("other", "main", labels={"app": "serve"}).run()
    assert fresh(other, before)
    other.remove()
    successor = b.kubelet.gpu_pod("train-2", "main", "side", labels=TRAIN).run()
    assert going_on(successor, before)
    done = in_phase(plane, "restore", "demo", "Restored", both)
    watch.kill()
    shown, _ = watch.communicate()
    rows = [line.split() for line in shown.splitlines()]
    assert rows[0] == ["NAME", "PHASE", "POD"]
    for row in (
        ["demo", "Created"],
        ["demo", "Restoring", "train-2"],
        ["demo", "Restored", "train-2"],
    ):
        assert row in rows
    assert done["status"]["nodeName"] == "node-b"
    assert done["status"]["podUID"] == successor.uid
    assert why(done) == "True Complete: main, side of pod train-2 run again"

    # One pod for each Restore: the next one starts from its beginning, and so does a container of
    # the restored pod that ends.
    second = b.kubelet.gpu_pod("train-3", "main", labels=TRAIN)
    successor.stop("side")
    successor.create("side")
    successor.start("side")
    assert _began(successor, "side") > before["side"].time
    successor.remove()
    assert fresh(second.run(), before)
    second.remove()

    # One that the webhook has annotated is asked about nothing, and the Restore ends alike.
    restore(plane, "hooked", {"app": "none"}, "demo")
    waiting = in_phase(plane, "restore", "hooked", "Created", both)
    taken = json.dumps({"status": {"phase": "Restoring"}})
    patch = ("patch", "restore", "hooked", "--subresource=status", "--type=merge", "-p", taken)
    plane.kubectl(*patch)
    notes = {
        "grit.dev/checkpoint": one["status"]["dataPath"],
        "grit.dev/restore-uid": waiting["metadata"]["uid"],
    }
    third = b.kubelet.gpu_pod("train-4", "main", "side", labels=TRAIN, annotations=notes).run()
    assert going_on(third, before)
    in_phase(plane, "restore", "hooked", "Restored", both)


def test_the_agent_is_killed_while_it_restores(
    clean: ControlPlane, both: tuple[Worker, Worker]
) -> None:
    plane, b = clean, both[1]
    before = saved(plane, both, "killed", "main", "side")
    restore(plane, "killed", TRAIN, "killed")
    pending_on(b)
    successor = b.kubelet.gpu_pod("train-2", "main", "side", labels=TRAIN)
    successor.run_sandbox()
    successor.create("main")
    successor.start("main")
    in_phase(plane, "restore", "killed", "Restoring", both)
    b.kill_agent()
    # Nobody answers: the container is not started, and told why.
    gpu.configure(b.node, agent_timeout=0.5)
    successor.create("side")
    with pytest.raises(ServiceError, match=r"agent has not said within 0\.5 s"):
        successor.start("side")
    gpu.configure(b.node, **PATIENT)
    b.start_agent()
    successor.create("side")
    successor.start("side")
    assert going_on(successor, before)
    in_phase(plane, "restore", "killed", "Restored", both)


def made_on_kernel(directory: Path, release: str) -> None:
    """Has the checkpoint of the container main be one that was made on such a kernel."""
    manifest, sums = directory / "main/checkpoint/grit.json", directory / "SHA256SUMS"
    facts = json.loads(manifest.read_text())
    for key in ("self_check", "sha256_of_the_above"):
        facts.pop(key, None)
    before = hashlib.sha256(manifest.read_bytes()).hexdigest()
    manifest.write_text(json.dumps({**facts, "kernel": release}))
    after = hashlib.sha256(manifest.read_bytes()).hexdigest()
    sums.write_text(sums.read_text().replace(before, after))


def test_what_cannot_be_restored_says_why(clean: ControlPlane, both: tuple[Worker, Worker]) -> None:
    plane, b = clean, both[1]
    restore(plane, "missing", TRAIN, "none")
    one = in_phase(plane, "restore", "missing", "Failed", both)
    assert why(one).startswith("False CheckpointNotFound: there is no Checkpoint none:")

    # A checkpoint that does not fit the node: refused with the shim's words, and the pod does not
    # start before somebody has looked at it.
    before = saved(plane, both, "newer", "main")
    made_on_kernel(b.node.path(f"{STORE}/default/newer"), "99.1.0")
    restore(plane, "newer", TRAIN, "newer")
    pending_on(b)
    # Another program of the same labels is not what was saved.
    other = b.kubelet.pod("train-0", {"main": ["sleep", "1000"]}, labels=TRAIN).run()
    assert "runs ['sleep', '1000']" in why(plane.get("restore", "newer"))
    other.remove()
    successor = b.kubelet.gpu_pod("train-2", "main", labels=TRAIN).run_sandbox()
    for told in ("older than theirs", "the Restore default/newer for this pod has"):
        successor.create("main")
        with pytest.raises(ServiceError, match=told):
            successor.start("main")
        one = in_phase(plane, "restore", "newer", "Failed", both)
    assert "older than theirs" in why(one)
    plane.kubectl("delete", "restore", "newer")
    gpu.until(
        "nothing pending",
        lambda: not list(b.node.path("/run/containerd/grit-intents").glob("*.pending")),
    )
    successor.create("main")
    successor.start("main")
    assert fresh(successor, before)


@pytest.fixture(scope="module")
def pods(both: tuple[Worker, Worker]) -> Iterator[Path]:
    """From here on the agents ask an API server that knows pods: the directory that holds them."""
    place = f"{STORE}/core"
    both[0].node.path(place).mkdir()
    apis = [_core_api(worker, place) for worker in both]
    yield both[0].node.path(place)
    for api in apis:
        api.kill()
        api.wait(30)


def _core_api(worker: Worker, place: str) -> Process:
    node, path = worker.node, worker.node.path(KUBECONFIG)
    config = yaml.safe_load(path.read_text())
    (cluster,), (user,) = config["clusters"], config["users"]
    home = node.path("/etc/kubernetes/core")
    home.mkdir()
    for name, encoded in (
        ("ca.crt", cluster["cluster"]["certificate-authority-data"]),
        ("client.crt", user["user"]["client-certificate-data"]),
        ("client.key", user["user"]["client-key-data"]),
    ):
        (home / name).write_bytes(base64.b64decode(encoded))
    (home / "core_api.py").write_text(Path(__file__).with_name("core_api.py").read_text())
    words = [f"{ENVIRONMENT}/bin/python", "/etc/kubernetes/core/core_api.py", "8001"]
    words += [f"{control_plane.ADDRESS}:{control_plane.PORT}", "/etc/kubernetes/core", place]
    api = node.popen(words)
    cluster["cluster"] = {"server": "http://127.0.0.1:8001"}
    path.write_text(yaml.safe_dump(config))
    worker.kill_agent()
    worker.start_agent()
    return api


def make_known(pods: Path, pod: Pod, owner: str, rank: str = "0") -> None:
    """Has the API server know the pod, as that controller's, of that rank."""
    controller = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner}
    meta = {
        "namespace": "default",
        "name": pod.name,
        "uid": pod.uid,
        "ownerReferences": [{**controller, "controller": True}],
    }
    main = {"name": "main", "env": [{"name": "RANK", "value": rank}]}
    known = {"metadata": meta, "spec": {"nodeName": pod.name, "containers": [main]}}
    (pods / f"default.{pod.name}.json").write_text(json.dumps(known))


def events(pods: Path) -> list[dict[str, Any]]:
    return list(map(json.loads, (pods / "events").read_text().splitlines()))


def test_auto_migration(both: tuple[Worker, Worker], pods: Path, clean: ControlPlane) -> None:
    plane, (a, b) = clean, both
    pod = a.kubelet.gpu_pod("train-x7k2p", "main").run()
    make_known(pods, pod, "rs-train")
    before = {"main": pod.next_report("main")}
    checkpoint(plane, "move", pod.name, autoMigration=True)
    one = in_phase(plane, "checkpoint", "move", "Submitted", both)
    assert "train-x7k2p is deleted; the Restore default/move waits" in str(one["status"])
    assert not (pods / "default.train-x7k2p.json").exists()
    pod.remove()

    other = b.kubelet.gpu_pod("serve-9q1zz", "main")
    sibling = b.kubelet.gpu_pod("train-b2k9w", "main")
    successor = b.kubelet.gpu_pod("train-c4m8d", "main")
    make_known(pods, other, "rs-serve")
    make_known(pods, sibling, "rs-train", rank="1")
    make_known(pods, successor, "rs-train")
    pending_on(b)
    assert fresh(other.run(), before)
    other.remove()
    # Of the same controller and the same program, but not what was saved.
    assert fresh(sibling.run(), before)
    assert "it differs in env of container main" in why(plane.get("restore", "move"))
    sibling.remove()
    assert going_on(successor.run(), before)
    done = in_phase(plane, "restore", "move", "Restored", both)
    assert done["status"]["targetPod"] == successor.name
    verbs = {(verb, "pods") for verb in (pods / "asked").read_text().split()}
    expired = {("delete", "checkpoints")}  # asked for when their time is over
    assert asked(plane) | verbs | expired | {("create", "events")} == allowed()
    seen = {(told["involvedObject"]["kind"], told["type"], told["reason"]) for told in events(pods)}
    for phase in ("Pending", "Checkpointing", "Submitting", "Submitted"):
        assert ("Checkpoint", "Normal", phase) in seen
    assert ("Restore", "Warning", "OtherSpec") in seen
