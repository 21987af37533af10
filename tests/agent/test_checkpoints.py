"""The life of a Checkpoint with an API server and pods in memory; the files are real."""

from __future__ import annotations

import datetime
import gc
import os
import threading

import pytest

from shim import checkpoint_dir
from shim.agent import podspec
from shim.agent.api import ApiError, Conflict, Unanswered
from shim.agent.checkpoints import ATTEMPTS, FINALIZER, Checkpoints
from shim.agent.migration import Migration
from shim.agent.settings import Settings
from shim.gritctl.containerd import ContainerdError
from shim.gritctl.interrupts import Interrupted
from shim.gritctl.saving import SavingError
from tests.agent.memory import KEY, Client, Killed, Server

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SPEC = {"containers": [{"name": "main", "image": "example/trainer:7"}]}


class Pods:
    """The pods of a node; `save` writes what `checkpoint_dir` takes for a pod's checkpoint."""

    def __init__(self, uid="p1"):
        self.there, self.paused, self.saves, self.resumed = uid, False, 0, 0
        self.error, self.dies, self.client, self.during = None, "", None, lambda: None

    def uid(self, pod, seconds=None):
        assert pod == "default/train"
        return self.there

    def go_on(self, pod):
        self.paused = False
        self.resumed += 1

    def save(self, pod, directory, display, interrupts):
        assert not self.paused
        self.saves += 1
        self.paused = True
        self._die("paused")
        self.during()
        if interrupts.came:
            self.paused = False
            raise Interrupted("interrupted. Undone")
        if self.error:
            self.paused = False
            raise self.error
        images = os.path.join(directory, "main", checkpoint_dir.IMAGES)
        os.makedirs(images)
        for name in (os.path.join(images, "inventory.img"), os.path.join(directory, "SHA256SUMS")):
            with open(name, "w") as file:
                file.write("x")
        self.paused = False
        self._die("published")

    def saved_bytes(self, directory):
        return 7

    def _die(self, where):
        if self.dies == where:
            self.client.dead = True
            raise Killed


class ApiPods:
    """The API server's pods: one, or what it says instead."""

    def __init__(self, found=None):
        self.found = found

    def get(self, namespace, name):
        assert (namespace, name) == ("default", "train")
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Agent(Checkpoints):
    def __init__(
        self, server, root, pods, node="n1", dies=None, after=False, migration=None, **settings
    ):
        migration = migration or Migration(Client(Server()), ApiPods())
        self.client = pods.client = Client(server, dies, after)
        self.lines = []
        found = Settings(node, root=str(root), **settings)
        super().__init__(self.client, pods, migration, found, self.lines.append)

    def settle(self, rounds=6):
        for _ in range(rounds):
            self.step()
            for job in list(self.jobs.values()):
                job.thread.join(20)


@pytest.fixture
def server():
    one = Server(podName="train")
    one.create()
    return one


def holds_checkpoint(root):
    return os.path.isdir(root / "default/one/main/checkpoint")


def test_from_none_to_checkpointed(server, tmp_path):
    pods = Pods()
    Agent(server, tmp_path, pods).settle()
    status = server.status()
    assert (status["phase"], status["nodeName"], status["podUID"]) == ("Checkpointed", "n1", "p1")
    assert status["dataPath"] == str(tmp_path / "default/one")
    assert status["progress"]["bytes"] == 7
    assert [each["status"] for each in status["conditions"]] == ["True"]
    assert holds_checkpoint(tmp_path)
    assert (pods.saves, pods.paused) == (1, False)
    assert server.kept[KEY]["metadata"]["finalizers"] == [FINALIZER]


@pytest.mark.parametrize(
    ("found", "known"),
    [
        ({"metadata": {"uid": "p1"}, "spec": SPEC}, True),
        ({"metadata": {"uid": "p0"}, "spec": SPEC}, False),  # another pod of that name
        (None, False),
        (ApiError("403 Forbidden"), False),
    ],
    ids=["known", "another", "none", "refused"],
)
def test_what_a_successor_has_to_share_is_in_the_status(server, tmp_path, found, known):
    migration = Migration(Client(Server()), ApiPods(found))
    agent = Agent(server, tmp_path, Pods(), migration=migration)
    agent.settle()
    status = server.status()
    assert status["phase"] == "Checkpointed"
    parts = podspec.parts(SPEC)
    assert status.get("podSpecParts") == (parts if known else None)
    assert status.get("podSpecHash") == (podspec.digest(parts) if known else None)
    assert any("403" in line for line in agent.lines) == isinstance(found, ApiError)


def test_an_api_server_that_goes_away_is_waited_for(server, tmp_path):
    pods = ApiPods(Unanswered("down"))
    agent = Agent(server, tmp_path, Pods(), migration=Migration(Client(Server()), pods))
    agent.settle()
    assert server.status()["phase"] == "Pending"
    pods.found = None
    agent.settle()
    assert server.status()["phase"] == "Checkpointed"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("dies", [1, 2, 3, 4])
def test_killed_at_each_write(server, tmp_path, dies, after):
    pods = Pods()
    killed = Agent(server, tmp_path, pods, dies=dies, after=after)
    with pytest.raises(Killed):
        killed.settle()
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert holds_checkpoint(tmp_path)
    assert (pods.saves, pods.paused) == (1, False)


@pytest.mark.parametrize(("where", "saves"), [("paused", 2), ("published", 1)])
def test_killed_while_it_saves(server, tmp_path, where, saves):
    pods = Pods()
    pods.dies = where
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()
    pods.dies = ""
    assert server.status()["phase"] == "Checkpointing"
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert (pods.saves, pods.paused) == (saves, False)


def test_killed_again_and_again_ends_with_the_pod_running(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    for _ in range(ATTEMPTS):
        with pytest.raises(Killed):
            Agent(server, tmp_path, pods).settle()
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert "the pod runs on" in server.message()
    assert (pods.saves, pods.paused) == (ATTEMPTS, False)


def test_a_pod_that_cannot_be_resumed_is_told_of(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()

    def go_on(pod):
        raise ContainerdError("UNAVAILABLE", "no shim")

    pods.go_on = go_on
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert "no shim" in server.message()
    assert "gritctl resume -n k8s.io default/train" in server.message()


def test_pod_replaced_while_no_agent_ran(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()
    pods.there, pods.dies = "p2", ""
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert pods.saves == 1
    assert pods.resumed == 0


def test_of_two_agents_one_does_it(server, tmp_path):
    """Both have looked before either writes."""
    pods = Pods(), Pods()
    agents = [Agent(server, tmp_path, one, node=f"n{i}") for i, one in enumerate(pods)]
    looked = [agent.client.list()[0][0] for agent in agents]
    agents[0]._look(looked[0])
    with pytest.raises(Conflict):
        agents[1]._look(looked[1])
    for _ in range(3):
        for agent in agents:
            agent.settle(1)
    assert server.status()["nodeName"] == "n0"
    assert [one.saves for one in pods] == [1, 0]


def test_a_node_that_is_silent_is_lost_but_not_while_nobody_could_write(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()
    other = Agent(server, tmp_path, Pods(None), node="n2", lease_seconds=1000)
    other.step()
    key = next(iter(other.spells.since))
    other.spells.since[key] -= 2000
    server.down = True
    with pytest.raises(ApiError):
        other.step()
    server.down = False
    other.step()
    assert server.status()["phase"] == "Checkpointing"
    other.spells.since[key] -= 2000
    other.step()
    assert server.status()["phase"] == "Failed"
    assert "node n1" in server.message()


def lost(server, tmp_path, pods):
    """Its agent is killed, and another has noticed."""
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()
    other = Agent(server, tmp_path, Pods(None), node="n2")
    other.step()
    other.spells.since = {key: since - 2000 for key, since in other.spells.since.items()}
    other.step()
    assert server.status()["conditions"][0]["reason"] == "NodeLost"


def test_lost_and_back_the_pod_is_resumed(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    lost(server, tmp_path, pods)
    assert pods.paused
    pods.dies = ""
    for _ in range(2):
        Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert "is back: the pod runs on" in server.message()
    assert (pods.saves, pods.resumed, pods.paused) == (1, 1, False)


def test_lost_and_back_with_whole_files(server, tmp_path):
    pods = Pods()
    pods.dies = "published"
    lost(server, tmp_path, pods)
    pods.dies = ""
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert holds_checkpoint(tmp_path)
    assert pods.saves == 1


def test_lost_and_back_after_it_was_deleted(server, tmp_path):
    pods = Pods()
    pods.dies = "paused"
    lost(server, tmp_path, pods)
    pods.dies = ""
    server.mark_deleted()
    Agent(server, tmp_path, pods).settle()
    assert not server.kept
    assert not pods.paused


def test_containerd_that_is_away_is_waited_for(server, tmp_path):
    """An agent that is back before its containerd does not give up a pod that it had paused."""
    pods = Pods()
    pods.dies = "paused"
    with pytest.raises(Killed):
        Agent(server, tmp_path, pods).settle()
    pods.dies, asked = "", []

    def uid(pod, seconds=None):
        asked.append(pod)
        if len(asked) < 3:
            raise ContainerdError("UNAVAILABLE", "no containerd")
        return "p1"

    pods.uid = uid
    Agent(server, tmp_path, pods, lease_seconds=0.01).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert (pods.saves, pods.paused) == (2, False)


def test_containerd_that_hangs_is_asked_once_for_all(server, tmp_path):
    server.create("two", "u2")
    pods, asked = Pods(), []

    def uid(pod, seconds=None):
        asked.append(seconds)
        raise ContainerdError("DEADLINE_EXCEEDED", "hangs")

    pods.uid = uid
    agent = Agent(server, tmp_path, pods, lease_seconds=30)
    agent.step()
    assert asked == [5]
    agent.step()
    assert asked == [5, 5]


def test_an_annotation_that_is_no_time_is_told(server, tmp_path):
    server.kept[KEY]["metadata"]["annotations"] = {"grit.dev/ttl-seconds-after-finished": "1h"}
    Agent(server, tmp_path, Pods()).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert "'1h', which is no number of seconds" in server.message()


def test_a_claim_lost_meanwhile_leaves_no_files(server, tmp_path):
    pods = Pods()

    def fail():
        server.status()["phase"] = "Failed"

    pods.during = fail
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert not holds_checkpoint(tmp_path)
    assert not pods.paused


def test_renewed_with_progress_while_it_saves(server, tmp_path):
    pods = Pods()
    agent = Agent(server, tmp_path, pods, lease_seconds=0.000001)

    def during():
        assert "progress" not in server.status()
        agent.step()
        assert "seconds" in server.status()["progress"]

    pods.during = during
    agent.settle()
    assert server.status()["phase"] == "Checkpointed"


def test_deleted_while_it_saves(server, tmp_path):
    pods = Pods()
    agent = Agent(server, tmp_path, pods)

    def delete():
        server.mark_deleted()
        agent.step()

    pods.during = delete
    agent.settle()
    assert not server.kept
    assert not holds_checkpoint(tmp_path)
    assert not pods.paused


def test_deleted_with_its_files(server, tmp_path):
    agent = Agent(server, tmp_path, Pods())
    agent.settle()
    server.mark_deleted()
    Agent(server, tmp_path, Pods(), node="n2").settle()
    assert server.kept, "the files are another node's"
    agent.settle()
    assert not server.kept
    assert os.listdir(tmp_path / "default") == []


def test_deleted_with_the_drafts_of_killed_agents(server, tmp_path):
    agent = Agent(server, tmp_path, Pods())
    agent.settle()
    own, other = (tmp_path / f"default/.{name}.grit-partial-{'0' * 16}" for name in ("one", "two"))
    for draft in (own, other):
        draft.mkdir()
    server.mark_deleted()
    agent.settle()
    assert os.listdir(tmp_path / "default") == [other.name]


def test_a_path_in_the_status_that_is_no_store_is_left_alone(server, tmp_path):
    agent = Agent(server, tmp_path / "store", Pods())
    agent.settle()
    os.makedirs(tmp_path / "store/default", exist_ok=True)
    os.rename(tmp_path / "store/default/one", tmp_path / "mine")
    server.status()["dataPath"] = str(tmp_path / "store/../mine")
    server.mark_deleted()
    agent.settle()
    assert os.path.isdir(tmp_path / "mine/main/checkpoint")


def test_what_cannot_be_removed_is_told(server, tmp_path):
    agent = Agent(server, tmp_path, Pods())
    agent.settle()
    (tmp_path / "default/one/notes").mkdir()
    (tmp_path / "default/one/notes/mine").write_text("x")
    server.mark_deleted()
    agent.settle()
    assert "notes" in server.message()
    os.remove(tmp_path / "default/one/notes/mine")
    os.rmdir(tmp_path / "default/one/notes")
    agent.settle()
    assert not server.kept


@pytest.mark.parametrize("error", [SavingError("no room"), ContainerdError("UNKNOWN", "no room")])
def test_failure_has_its_reason(server, tmp_path, error):
    pods = Pods()
    pods.error = error
    Agent(server, tmp_path, pods).settle()
    assert (server.status()["phase"], server.message()) == ("Failed", "no room")
    assert pods.saves == 1


def test_pod_that_runs_nowhere(server, tmp_path):
    agent = Agent(server, tmp_path, Pods(None), pod_wait_seconds=1000)
    agent.settle()
    assert server.status()["phase"] == "Created"
    agent.spells.since = {key: since - 2000 for key, since in agent.spells.since.items()}
    agent.settle(1)
    assert server.status()["phase"] == "Failed"
    assert "default/train runs on no node" in server.message()


def test_refused_with_nothing_done(server, tmp_path):
    server.create(volumeClaim={"claimName": "nfs"})
    pods = Pods()
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert "nfs is no store" in server.message()
    assert pods.saves == 0


def test_a_directory_that_is_there_is_not_overwritten(server, tmp_path):
    (tmp_path / "default/one").mkdir(parents=True)
    (tmp_path / "default/one/mine").write_text("x")
    pods = Pods()
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert pods.saves == 0
    server.mark_deleted()
    Agent(server, tmp_path, pods).settle()
    assert (tmp_path / "default/one/mine").read_text() == "x"
    assert not server.kept


def test_two_checkpoints_of_one_pod_come_one_after_the_other(server, tmp_path):
    server.create("two", "u2")
    pods, second = Pods(), threading.Event()

    def during():
        if pods.saves == 2:
            second.set()
        elif not second.wait(0.3):  # time to come, were it let in
            pods.during = lambda: None

    pods.during = during
    Agent(server, tmp_path, pods).settle()
    assert not second.is_set()
    assert [server.status(("default", name))["phase"] for name in ("one", "two")] == [
        "Checkpointed"
    ] * 2
    assert pods.saves == 2


def test_stopped_agent_leaves_it_to_the_next(server, tmp_path):
    pods = Pods()
    agent = Agent(server, tmp_path, pods)
    pods.during = lambda: [setattr(job.interrupts, "came", True) for job in agent.jobs.values()]
    agent.step()
    for job in list(agent.jobs.values()):
        job.thread.join(20)
    assert server.status()["phase"] == "Checkpointing"
    assert not pods.paused
    pods.during = lambda: None
    Agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Checkpointed"


@pytest.mark.parametrize("by", ["spec", "annotation"])
def test_deleted_when_its_time_is_over(server, tmp_path, by):
    if by == "spec":
        server.kept[KEY]["spec"]["ttlSecondsAfterFinished"] = 3600
    else:
        note = {"grit.dev/ttl-seconds-after-finished": "3600"}
        server.kept[KEY]["metadata"]["annotations"] = note
    agent = Agent(server, tmp_path, Pods())
    agent.settle()
    assert server.status()["phase"] == "Checkpointed"
    long_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    server.status()["finishedAt"] = long_ago.strftime("%Y-%m-%dT%H:%M:%SZ")
    agent.settle()
    assert not server.kept
    assert not holds_checkpoint(tmp_path)


def test_one_that_cannot_be_handled_does_not_keep_up_the_others(server, tmp_path):
    server.kept = {}
    server.create("bad", "u0")
    server.kept["default", "bad"]["status"] = {"phase": "Failed", "finishedAt": "yesterday"}
    server.kept["default", "bad"]["spec"]["ttlSecondsAfterFinished"] = 1
    server.create("invalid", "u2")
    server.create()
    agent = Agent(server, tmp_path, Pods())
    put = agent.client.put

    def refuse(one):
        if one["metadata"]["name"] == "invalid":
            raise ApiError("422")
        return put(one)

    agent.client.put = refuse
    agent.settle()
    assert server.status()["phase"] == "Checkpointed"
    assert any("default/bad" in line for line in agent.lines)
    assert any("default/invalid: 422" in line for line in agent.lines)


def test_nothing_is_kept_of_checkpoints_that_have_gone(server, tmp_path):
    """Beyond what the first ones left: as many objects after 60 as after 20."""
    agent = Agent(server, tmp_path, Pods())
    counts = []
    for turn in range(60):
        agent.settle(4)
        assert server.status()["phase"] == "Checkpointed"
        server.mark_deleted()
        agent.settle(3)
        assert not server.kept
        server.create()
        agent.lines.clear()
        if turn in (19, 59):
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[1] - counts[0] < 40
