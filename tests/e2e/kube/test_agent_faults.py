"""Faults around a Checkpoint, on two nodes with real agents, containerd, etcd and API server: each
ends in a phase and a condition that are right, the pod runs on with its values and its GPU, and
nothing half is left."""

from __future__ import annotations

import contextlib
import datetime
from typing import TYPE_CHECKING

import pytest

from shim.agent.checkpoints import TTL
from tests.e2e import gpu
from tests.e2e.kube.control_plane import granted
from tests.e2e.kube.workers import STORE, Worker, checkpoint, ended, two, why
from tests.e2e.pods.kubelet import NAMESPACE
from tests.nodes.installed import ENVIRONMENT
from tests.nodes.node import SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.kube.control_plane import ControlPlane
    from tests.e2e.pods.kubelet import Pod

SMALL = "/mnt/small"
NOBODYS = "nobodys"
PARTS = ("resource", "subresource")
SETTINGS = "lease_seconds = 3\npod_wait_seconds = 20\n"
MOUNT = """
import ctypes, os, sys
os.mkdir(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"small", sys.argv[1].encode(), b"tmpfs", 0, b"size=8m,mode=0700"):
    sys.exit(os.strerror(ctypes.get_errno()))
"""


@pytest.fixture(scope="module")
def workers(
    resources: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Worker, Worker]]:
    with two(resources, tmp_path_factory.mktemp("store"), SETTINGS, small=SMALL) as both:
        both[0].node.run([f"{ENVIRONMENT}/bin/python", "-c", MOUNT, SMALL])
        checkpoint(resources, NOBODYS, "nobody")  # it takes its time to fail
        yield both
        resources.kubectl("delete", "checkpoint", NOBODYS)


@pytest.fixture(scope="module")
def train(workers: tuple[Worker, Worker]) -> Iterator[Pod]:
    """A GPU pod on node-a."""
    yield (pod := workers[0].kubelet.gpu_pod("train", "main").run())
    pod.remove()


@pytest.fixture
def pod(resources: ControlPlane, workers: tuple[Worker, Worker], train: Pod) -> Iterator[Pod]:
    """`train`, which whatever the test does must not change; and of its Checkpoints nothing may be
    left once they were deleted."""
    before = train.next_report()
    yield train
    for worker in workers:
        worker.let_agent_run()
    gpu.go_on(before, train.next_report())
    tasks = train.node.ctr("-n", NAMESPACE, "task", "ls").stdout
    assert "PAUSED" not in tasks
    names = resources.kubectl("get", "checkpoint", "-o", "name").stdout.split()
    made = [name for name in names if not name.endswith(f"/{NOBODYS}")]
    if made:
        resources.kubectl("delete", "--timeout=50s", *made, "--ignore-not-found")
    for store in (STORE, SMALL):
        assert kept(train.node.path(store)) == []


def kept(store: Path) -> list[str]:
    """What is in a store, drafts included, but for the directories of namespaces."""
    return [str(one.relative_to(store)) for one in store.glob("*/*")]


@contextlib.contextmanager
def dump_held(worker: Worker) -> Iterator[None]:
    """Waits for CRIU to dump something on the node, and holds it (SIGSTOP) there meanwhile."""

    def dumping() -> int:
        every = worker.node.processes().items()
        # What it calls itself then; before the pause it is asked for its version, too.
        return next((pid for pid, words in every if words[0].startswith("criu: dump")), 0)

    pid = gpu.until("CRIU to dump", dumping)
    worker.node.run(["kill", "-STOP", str(pid)])
    try:
        yield
    finally:
        worker.node.run(["kill", "-CONT", str(pid)], check=False)


def until_logged(worker: Worker, words: str) -> None:
    gpu.until(f"{worker.name} to say {words}", lambda: words in worker.log())


def test_agent_killed_at_each_phase(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    """One Checkpoint, whose agent is killed wherever it comes next; where that was is seen from
    outside. The last one only has to say that the files are there."""
    a, b = workers
    b.kill_agent()  # it would take the other for lost; that is another test

    def killed(phase: str, *, paused: bool) -> None:
        a.kill_agent()
        assert resources.get("checkpoint", "one")["status"]["phase"] == phase
        tasks = a.node.ctr("-n", NAMESPACE, "task", "ls").stdout
        assert ("PAUSED" in tasks) is paused

    a.kill_agent()
    a.start_agent(hold="shim.agent.checkpoints:Checkpoints._begin")
    checkpoint(resources, "one", "train")
    a.until_held()
    killed("Pending", paused=False)
    a.start_agent(hold="shim.agent.pods:Pods.save")
    a.until_held()
    killed("Checkpointing", paused=False)
    a.start_agent()
    with dump_held(a):
        killed("Checkpointing", paused=True)
    a.start_agent(hold="shim.agent.checkpoints:Checkpoints._done")
    a.until_held()
    killed("Checkpointing", paused=False)
    a.start_agent()
    one = ended(resources, (a,), "one", "Checkpointed")
    assert one["status"]["attempts"] == 3
    a.node.run(["/usr/local/bin/gritctl", "verify", "--no-node", f"{STORE}/default/one/main"])
    assert kept(a.node.path(STORE)) == ["default/one"]


def test_etcd_and_api_server_away_for_longer_than_a_lease(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    a = workers[0]
    checkpoint(resources, "one", "train")
    with dump_held(a):
        resources.stop("etcd")
    try:
        # A call that is not answered is given up after 10 s.
        until_logged(a, "checkpoint default/one is Checkpointed, which cannot be written")
    finally:
        resources.stop("apiserver")
        resources.start_etcd()
        resources.start_server()
    one = ended(resources, workers, "one", "Checkpointed")
    assert one["status"]["attempts"] == 1


def test_node_lost_and_back(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    a = workers[0]
    checkpoint(resources, "one", "train")
    with dump_held(a):
        a.kill_agent()
        a.node.kill_containerd()
    one = ended(resources, workers, "one", "Failed")
    assert why(one).startswith("False NodeLost: the agent on node node-a has not been heard of")
    a.start_agent()  # before containerd, as it may be after a crash of both
    until_logged(a, f"default/one: containerd at {SOCKET} does not answer")
    a.node.start_containerd(env=gpu.ENVIRONMENT_OF_GRIT)
    back = "jsonpath={.status.conditions[0].reason}=NodeCameBack"
    resources.kubectl("wait", f"--for={back}", "checkpoint/one", "--timeout=30s")
    assert "is back: the pod runs on" in why(resources.get("checkpoint", "one"))


def test_store_full(resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod) -> None:
    script = "head -c 16777216 /dev/urandom > /file; while :; do sleep 1000; done"
    full = workers[0].kubelet.pod("full", {"main": ["sh", "-c", script]}).run()
    file = full.rootfs("main") / "file"
    gpu.until("a file too large", lambda: file.exists() and file.stat().st_size == 16 << 20)
    checkpoint(resources, "one", "full", claim="small")
    one = ended(resources, workers, "one", "Failed")
    assert why(one).startswith("False CheckpointFailed: ")
    assert "No space left on device" in why(one)
    assert "no checkpoint was made, and main runs on" in why(one)
    assert kept(pod.node.path(SMALL)) == []
    assert full.shell("main", "echo it does").strip() == "it does"
    full.remove()


def test_pod_gone(resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod) -> None:
    """One that never was, and one that ends while it is dumped."""
    a = workers[0]
    idle = a.kubelet.pod("idle", {"main": ["sleep", "1000"]}).run()
    checkpoint(resources, "one", "idle")
    with dump_held(a):
        a.node.run(["kill", "-KILL", str(idle.task_pids()["main"])])
    one = ended(resources, workers, "one", "Failed")
    assert why(one).startswith("False CheckpointFailed: ")
    one = ended(resources, workers, NOBODYS, "Failed")
    assert why(one).startswith("False PodNotFound: pod default/nobody runs on no node")
    idle.remove()


def test_containerd_hangs(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    """It cannot be asked for a pod; the claim that the agent has is renewed all the same, for
    longer than a lease."""
    a = workers[0]

    def held_until() -> float:
        """Until when the claim is held, in seconds."""
        status = resources.get("checkpoint", "one")["status"]
        assert status["phase"] == "Checkpointing", status
        return datetime.datetime.fromisoformat(status["holder"]["until"]).timestamp()

    checkpoint(resources, "one", "train")
    with contextlib.ExitStack() as stack:
        with dump_held(a):
            stack.enter_context(a.node.hung_containerd())
        checkpoint(resources, "two", "train")
        until_logged(a, f"default/two: containerd at {SOCKET} has not answered in time")
        before = held_until()
        gpu.until("claims renewed", lambda: held_until() > before + 3)
    for name in ("one", "two"):
        ended(resources, workers, name, "Checkpointed")


def test_what_the_api_server_takes_but_cannot_be_done(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    """The rest is refused by the schema: test_resources."""
    checkpoint(resources, "claim", "train", claim="nobodys")
    checkpoint(resources, "note", "train", notes={TTL: "1h"})
    checkpoint(resources, "gone", "train", notes={TTL: "0"})
    one = ended(resources, workers, "claim", "Failed")
    assert why(one).startswith("False UnknownStore: the volumeClaim nobodys is no store")
    one = ended(resources, workers, "note", "Checkpointed")
    assert "'1h', which is no number of seconds" in why(one)
    resources.kubectl("wait", "--for=delete", "checkpoint/gone", "--timeout=30s")
    assert kept(pod.node.path(STORE)) == ["default/note"]


def test_the_agents_rights_are_those_that_they_use(
    resources: ControlPlane, workers: tuple[Worker, Worker], pod: Pod
) -> None:
    """One Checkpoint's whole life needs all that the packaged ClusterRole grants of Checkpoints,
    its pod is asked for and events are made; no agent was ever refused anything."""
    checkpoint(resources, "one", "train", notes={TTL: "0"})
    resources.kubectl("wait", "--for=delete", "checkpoint/one", "--timeout=50s")
    # Another test asks by kubectl, in the agents' name, for what they must not have.
    events = [e for e in resources.audit() if not e["userAgent"].startswith("kubectl")]
    refused = [event for event in events if event["responseStatus"]["code"] == 403]
    assert refused == []
    used = {
        (event["verb"], what.get("apiGroup", ""), "/".join(filter(None, map(what.get, PARTS))))
        for event in events
        for what in [event["objectRef"]]
    }
    every = {
        (verb, group, resource)
        for rule in granted()
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    of_checkpoints = {one for one in every if one[2].startswith("checkpoints")}
    assert of_checkpoints | {("get", "", "pods"), ("create", "", "events")} <= used <= every
