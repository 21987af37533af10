"""The life of a Restore with an API server and pods in memory; the files between agent and shim are
real, and so is the shim's half that writes and reads them."""

from __future__ import annotations

import json
import os
import threading
import time
from types import SimpleNamespace

import pytest

from shim import bundle, intents, places
from shim.agent import fitting, podspec
from shim.agent.api import ApiError, Conflict
from shim.agent.desk import Desk
from shim.agent.pods import Starting
from shim.agent.restores import Restores
from shim.agent.settings import Settings
from tests.agent.memory import KEY, Client, Killed, Server

ARGUMENTS = ["python", "train.py"]


class Node:
    """A node's pods, the directory between its agent and shims, and agents one after the other."""

    def __init__(self, root, server, checkpoints, name="n1"):
        self.root, self.name, self.server, self.checkpoints = root, name, server, checkpoints
        self.directory = root / f"{name}-intents"
        self.pods, self.containers, self.ran = {}, {}, set()
        self.spec = {}
        self.agent = None
        self.start()

    def start(self, dies=None, after=False, **settings):
        """A new agent, after whose write number `dies` it is killed, or before that."""
        found = Settings(self.name, root=str(self.root / "store"), **settings)
        client = Client(self.server, dies, after)
        self.lines = []
        self.agent = Restores(
            client,
            Client(self.checkpoints),
            self,
            self,
            Desk(str(self.directory)),
            found,
            self._say,
        )

    def _say(self, line):
        self.lines.append(line)

    def get(self, namespace, pod):
        """As the API server has it."""
        owner = {"uid": f"owner-of-{pod}"}
        return {"metadata": {"uid": self.pods[pod], "ownerReferences": [owner]}, "spec": self.spec}

    def running(self):
        return self.ran

    def uids(self):
        return set(self.pods.values())

    def starting(self, container):
        return self.containers.get(container)

    def container(self, identity, pod="train-2", name="main", labels=None, arguments=ARGUMENTS):
        """One that CRI is about to have created; its bundle."""
        uid = self.pods.setdefault(pod, f"uid-{pod}")
        labels = {"app": "train"} if labels is None else labels
        self.containers[identity] = Starting(
            name, "example/trainer:7", arguments, pod, "default", uid, labels
        )
        place = self.root / "bundles" / identity
        place.mkdir(parents=True)
        notes = {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.container-name": name,
            "io.kubernetes.cri.sandbox-id": f"sandbox-{pod}",
            "io.kubernetes.cri.sandbox-namespace": "default",
        }
        (place / "config.json").write_text(json.dumps({"annotations": notes}))
        config = SimpleNamespace(agent_timeout=20.0)
        return SimpleNamespace(id=identity, bundle=str(place), config=config, meant="")

    def ask(self, container):
        """What the shim gets to know, while the agents attend to it."""
        places.INTENTS = str(self.directory)
        found = []

        def ask():
            try:
                container.meant = intents.ask(container, bundle.read_spec(container.bundle))
                notes = bundle.annotations_of(bundle.read_spec(container.bundle))
                found.append(notes.get("grit.dev/checkpoint", ""))
            except intents.Unanswered as error:
                found.append(error)

        shim = threading.Thread(target=ask)
        shim.start()
        try:
            while shim.is_alive():
                self.agent.attend()
                shim.join(0.005)
        except Killed:
            self.start()
            self.agent.step()
            while shim.is_alive():
                self.agent.attend()
                shim.join(0.005)
        return found[0]

    def end(self, container, error=""):
        """The shim's word of how the restore ended."""
        places.INTENTS = str(self.directory)
        intents.tell(container, error)
        self.agent.attend()

    def pending(self):
        return sorted(os.listdir(self.directory))


@pytest.fixture(autouse=True)
def _place(monkeypatch):
    monkeypatch.setattr(places, "INTENTS", "")


@pytest.fixture
def checkpoints(tmp_path):
    """A Checkpoint `saved` of a pod with the containers main and side."""
    directory = tmp_path / "store/default/saved"
    for name in ("main", "side"):
        images = directory / name / "checkpoint"
        images.mkdir(parents=True)
        (images / "inventory.img").write_text("x")
        notes = {"io.kubernetes.cri.image-name": "example/trainer:7"}
        spec = {"process": {"args": ARGUMENTS}, "annotations": notes}
        (directory / name / "spec.dump").write_text(json.dumps(spec))
    one = Server(podName="train")
    one.create("saved", "c1")
    one.kept["default", "saved"]["status"] = {
        "phase": "Checkpointed",
        "dataPath": str(directory),
        "nodeName": "n0",
        "podUID": "uid-train",
    }
    return one


@pytest.fixture
def server():
    one = Server(checkpointName="saved", selector={"matchLabels": {"app": "train"}})
    one.create()
    return one


@pytest.fixture
def node(tmp_path, server, checkpoints):
    return Node(tmp_path, server, checkpoints)


def phase(server, key=KEY):
    status = server.status(key)
    return status["phase"], status["conditions"][0]["reason"]


def test_from_none_to_restored(node, server, tmp_path):
    node.agent.step()
    assert phase(server) == ("Created", "Waiting")
    assert node.pending() == ["default.u1.pending"]
    main, side = node.container("c1"), node.container("c2", name="side")
    assert node.ask(main) == str(tmp_path / "store/default/saved")
    status = server.status()
    assert phase(server) == ("Restoring", "Running")
    assert (status["targetPod"], status["podUID"]) == ("train-2", "uid-train-2")
    assert (status["nodeName"], status["holder"]["name"]) == ("n1", "n1")
    node.end(main)
    assert phase(server)[0] == "Restoring"
    assert node.ask(side)
    node.end(side)
    assert phase(server) == ("Restored", "Complete")
    assert server.message() == "main, side of pod train-2 run again"
    node.agent.step()
    assert node.pending() == []


def test_nothing_is_asked_where_nothing_is_pending(node):
    node.server.kept.clear()
    node.agent.step()
    places.INTENTS = str(node.directory)
    one = node.container("c1")
    one.config.agent_timeout = 0.0  # an answer that is waited for would be none
    assert intents.ask(one, bundle.read_spec(one.bundle)) == ""


def test_pods_that_are_not_meant_start_from_their_beginning(node, server):
    node.agent.step()
    assert node.ask(node.container("c1", "a", labels={"app": "serve"})) == ""
    assert node.ask(node.container("c2", "b", labels={})) == ""
    assert node.ask(node.container("c3", "c", name="init")) == ""  # none was saved
    assert phase(server) == ("Created", "Waiting")
    node.pods["train"] = "uid-train"  # the one that was saved, whose container ended
    assert node.ask(node.container("c4", "train")) == ""
    assert node.ask(node.container("c5", "d", arguments=["sleep", "9"])) == ""
    assert phase(server) == ("Created", "OtherProgram")
    assert "runs ['sleep', '9']" in server.message()
    assert node.ask(node.container("c6"))


def test_a_pod_that_is_specified_otherwise_is_not_meant(node, server, checkpoints):
    main = {"name": "main", "image": "example/trainer:7", "env": [{"name": "RANK", "value": "0"}]}
    parts = podspec.parts({"containers": [main]})
    checkpoints.status(("default", "saved"))["podSpecParts"] = parts
    node.agent.step()
    node.spec = {"containers": [{**main, "env": [{"name": "RANK", "value": "1"}]}]}
    assert node.ask(node.container("c1", "a")) == ""
    assert phase(server) == ("Created", "OtherSpec")
    assert "pod a is not as the one saved: it differs in env of container main" in server.message()
    node.spec = {"containers": [main, {"name": "new", "image": "example/new:1"}]}
    assert node.ask(node.container("c2", "b"))
    assert server.status()["targetPod"] == "b"


@pytest.mark.parametrize("known", ["another", "refused"])
def test_a_pod_that_the_api_server_does_not_tell_of_is_taken_by_its_program(
    node, server, checkpoints, known
):
    checkpoints.status(("default", "saved"))["podSpecParts"] = {"main/image": "x"}
    node.agent.step()

    def get(namespace, pod):
        if known == "refused":
            raise ApiError("403 Forbidden")
        return {"metadata": {"uid": "of-its-mirror"}}

    node.get = get
    assert node.ask(node.container("c1"))
    assert phase(server) == ("Restoring", "Running")


def test_of_two_pods_one_is_restored_and_of_two_restores_the_older(node, server):
    server.create("two", "u2")
    for name, when in (("one", "2026-01-02"), ("two", "2026-01-01")):
        server.kept["default", name]["metadata"]["creationTimestamp"] = when
    node.agent.step()
    first = node.container("c1", "a")
    assert node.ask(first)
    assert first.meant == "u2"
    assert server.status(("default", "two"))["targetPod"] == "a"
    second = node.container("c2", "b")
    assert node.ask(second)
    assert second.meant == "u1"
    assert node.ask(node.container("c3", "c")) == ""


def test_of_two_nodes_one_is_first(node, server, checkpoints, tmp_path):
    other = Node(tmp_path, server, checkpoints, "n2")
    for one in (node, other):
        one.agent.step()
    here, there = node.container("c1", "a"), other.container("c2", "b")
    looked = other.agent.api.list()
    assert node.ask(here)
    other.agent.api.list = lambda: looked
    with pytest.raises(Conflict):
        other.agent.answers.answer("c2")
    del other.agent.api.list
    assert other.ask(there) == ""
    assert server.status()["nodeName"] == "n1"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies", [1, 2, 3])
def test_killed_at_each_write(node, server, tmp_path, dies, after):
    node.start(dies, after)
    try:
        node.agent.step()
    except Killed:
        node.start()
        node.agent.step()
    main, side = node.container("c1"), node.container("c2", name="side")
    for one in (main, side):
        assert node.ask(one) == str(tmp_path / "store/default/saved")
    node.end(main)
    node.start(1, after)  # when it writes that it is done
    with pytest.raises(Killed):
        node.end(side)
    node.start()
    node.agent.step()
    assert phase(server) == ("Restored", "Complete")
    node.agent.step()
    assert node.pending() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda one: one.kept.clear(), "CheckpointNotFound"),
        (lambda one: one.status(("default", "saved")).update(phase="Failed"), "CheckpointNotReady"),
        (lambda one: one.kept["default", "saved"].pop("status"), "CheckpointNotReady"),
        (
            lambda one: one.kept["default", "saved"]["metadata"].update(deletionTimestamp="now"),
            "CheckpointDeleted",
        ),
    ],
)
def test_refused_before_any_pod_is_asked(node, server, checkpoints, change, reason):
    change(checkpoints)
    node.agent.step()
    assert phase(server) == ("Failed", reason)
    assert "No pod was touched" in server.message()
    assert node.pending() == []


def test_a_checkpoint_that_goes_before_the_pod_comes(node, server, checkpoints):
    node.agent.step()
    checkpoints.kept.clear()
    told = node.ask(node.container("c1"))
    assert phase(server) == ("Failed", "CheckpointNotFound")
    assert "does not start as long as this Restore is there" in str(told)


def test_files_that_are_not_on_this_node(node, server, checkpoints, tmp_path):
    node.agent.step()
    os.rename(tmp_path / "store/default/saved", tmp_path / "elsewhere")
    for path in (str(tmp_path / "store/default/saved"), str(tmp_path / "store/../elsewhere")):
        checkpoints.status(("default", "saved"))["dataPath"] = path
        told = node.ask(node.container(f"c{len(path)}"))
        assert phase(server) == ("Failed", "FilesMissing")
        assert "on node n0" in str(told)
        server.create()
        node.agent.step()


def test_a_restore_that_fails_holds_its_pod_until_it_is_deleted(node, server):
    node.agent.step()
    one = node.container("c1")
    assert node.ask(one)
    node.end(one, "the CPU lacks avx512")
    assert phase(server) == ("Failed", "RestoreFailed")
    assert "the CPU lacks avx512" in server.message()
    node.agent.step()
    again = node.ask(node.container("c2"))
    assert "default/one for this pod has failed: the CPU lacks avx512" in str(again)
    assert node.ask(node.container("c3", "another")) == ""
    server.mark_deleted()
    node.agent.step()
    assert node.pending() == []


def test_a_second_container_that_is_another_program(node, server):
    node.agent.step()
    assert node.ask(node.container("c1"))
    told = node.ask(node.container("c2", name="side", arguments=["sh"]))
    assert "side of pod train-2 runs ['sh']" in str(told)
    assert phase(server) == ("Failed", "OtherProgram")


def test_pod_that_goes(node, server):
    node.start(pod_wait_seconds=0.000001)
    node.agent.step()
    assert node.ask(node.container("c1", "a"))
    node.pods.clear()
    node.agent.step()
    node.agent.step()
    assert phase(server) == ("Failed", "PodGone")
    # Claimed, with nothing told: another may have it.
    server.create()
    node.start(3, pod_wait_seconds=0.000001)
    node.agent.step()
    node.container("c2", "b")
    (node.directory / "c2.question").write_text("")
    with pytest.raises(Killed):
        node.agent.attend()
    del node.containers["c2"]
    assert phase(server) == ("Pending", "Claimed")
    node.start(pod_wait_seconds=0.000001)
    node.pods.clear()
    node.agent.step()
    node.agent.step()
    assert phase(server) == ("Created", "Waiting")
    assert "targetPod" not in server.status()
    assert node.ask(node.container("c3", "c"))


def test_containers_that_never_come(node, server):
    node.start(restore_seconds=0.000001)
    node.agent.step()
    one = node.container("c1")
    assert node.ask(one)
    node.end(one)
    node.agent.step()
    node.agent.step()
    assert phase(server) == ("Failed", "TimedOut")


def test_a_node_that_is_silent_is_lost(node, server, checkpoints, tmp_path):
    other = Node(tmp_path, server, checkpoints, "n2")
    node.agent.step()
    main = node.container("c1")
    assert node.ask(main)
    other.agent.step()
    other.agent.spells.since = {
        key: since - 1000 for key, since in other.agent.spells.since.items()
    }
    other.agent.step()
    assert phase(server) == ("Failed", "NodeLost")
    assert "node n1" in server.message()
    # And is back, with what its shims have told meanwhile.
    node.start()
    for container in (main, node.container("c2", name="side")):
        container.meant = "u1"
        places.INTENTS = str(node.directory)
        intents.tell(container, "")
    node.agent.attend()
    node.agent.step()
    assert phase(server) == ("Restored", "Complete")


def test_the_claim_is_renewed(node, server):
    node.start(lease_seconds=0.000001)
    node.agent.step()
    assert node.ask(node.container("c1"))
    before = server.version
    node.agent.step()
    assert server.version == before + 1


def test_an_agent_that_does_not_answer(node):
    node.agent.step()
    one = node.container("c1")
    one.config.agent_timeout = 0.1
    places.INTENTS = str(node.directory)
    spec = bundle.read_spec(one.bundle)
    with pytest.raises(intents.Unanswered, match="has not said within"):
        intents.ask(one, spec)
    assert node.pending() == ["default.u1.pending"]
    long_ago = time.time() - intents.SILENT_SECONDS - 1
    os.utime(node.directory / "default.u1.pending", (long_ago, long_ago))
    one.config.agent_timeout = 1000.0
    assert intents.ask(one, spec) == ""


def test_other_namespaces_and_the_sandbox_ask_nothing(node):
    node.agent.step()
    places.INTENTS = str(node.directory)
    one = node.container("c1")
    spec = bundle.read_spec(one.bundle)
    for note in (
        {"io.kubernetes.cri.sandbox-namespace": "other"},
        {"io.kubernetes.cri.container-type": "sandbox"},
        {"io.kubernetes.cri.sandbox-id": ""},
    ):
        assert intents.ask(one, {"annotations": {**spec["annotations"], **note}}) == ""


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        ({"matchLabels": {"app": "train"}}, True),
        ({"matchLabels": {"app": "train", "no": "1"}}, False),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["train"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "In", "values": ["x"]}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["x"]}]}, True),
        ({"matchExpressions": [{"key": "no", "operator": "NotIn", "values": ["x"]}]}, True),
        ({"matchExpressions": [{"key": "app", "operator": "Exists"}]}, True),
        ({"matchExpressions": [{"key": "no", "operator": "Exists"}]}, False),
        ({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}, False),
        (
            {
                "matchLabels": {"app": "train"},
                "matchExpressions": [{"key": "app", "operator": "DoesNotExist"}],
            },
            False,
        ),
    ],
)
def test_selectors(selector, selected):
    assert fitting.selects(selector, {"app": "train", "tier": "gpu"}) is selected


def test_a_pod_of_the_owner(node, server):
    server.create(ownerRef={"uid": "owner-of-b"})
    node.agent.step()
    assert node.ask(node.container("c1", "a")) == ""
    assert node.ask(node.container("c2", "b", labels={})) == ""  # both, if both are given
    server.kept[KEY]["spec"]["selector"] = None
    assert node.ask(node.container("c3", "b", labels={}))


def test_a_pod_that_ran_before_is_not_one_that_starts(node):
    node.pods["a"] = "uid-a"
    node.ran = {"uid-a"}
    node.agent.step()
    node.ran = {"uid-a", "uid-b"}
    node.start()
    node.agent.step()
    assert node.ask(node.container("c1", "a")) == ""
    assert node.ask(node.container("c2", "b"))


def test_a_question_that_cannot_be_answered_holds_up_no_other(node, server):
    server.kept[KEY]["spec"] |= {"selector": None, "ownerRef": {"uid": "owner-of-b"}}
    server.create("two", "u2")
    node.agent.step()
    (node.directory / "c0.question").write_text("")
    node.containers["c0"] = SimpleNamespace(namespace="default")  # makes a mistake of any kind
    get = node.get

    def refused(namespace, pod):
        raise ApiError("403 Forbidden")

    node.get = refused
    one = node.container("c1", "a")
    assert node.ask(one)
    assert one.meant == "u2"
    assert any("c0: AttributeError" in line for line in node.lines)
    assert any("owner and specification of pod a are not known: 403" in line for line in node.lines)
    node.get = get
    assert node.ask(node.container("c2", "b"))
