"""A Checkpoint with autoMigration, the API server in memory: the Restore comes before the pod goes,
and whoever is killed in between, both come to pass once."""

from __future__ import annotations

import pytest

from shim.agent.migration import Migration
from tests.agent.memory import KEY, Client, Killed, Server
from tests.agent.test_checkpoints import Agent, Pods, holds_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
JOB = {"kind": "Job", "name": "train", "uid": "j1", "controller": True}


class Cluster:
    """Pods and Restores of the API server. Agents take a Restore up as soon as it is there."""

    def __init__(self):
        self.restores, self.deleted, self.dies = Server(), [], ""
        meta = {"namespace": "default", "name": "train", "uid": "p1", "ownerReferences": [JOB]}
        self.pod = {"metadata": meta, "spec": {}}
        self.takes_up = "Created"

    def get(self, namespace, name):
        assert (namespace, name) == ("default", "train")
        return self.pod

    def delete(self, pod):
        assert self.restores.kept[KEY]["status"] == {"phase": "Created"}
        self._die("delete")
        self.deleted.append(pod["metadata"]["uid"])
        self.pod = None
        self._die("deleted")

    def create(self, one):
        self._die("create")
        Client(self.restores).create(one)
        if self.takes_up:
            self.restores.kept[KEY].setdefault("status", {"phase": self.takes_up})
        self._die("created")

    def _die(self, where):
        if self.dies == where:
            self.dies = ""
            self.client.dead = True
            raise Killed

    def agent(self, server, root, pods, **options):
        restores = Client(self.restores)
        restores.create = self.create
        agent = Agent(server, root, pods, migration=Migration(restores, self), **options)
        self.client = agent.client
        return agent


@pytest.fixture
def server():
    one = Server(podName="train", autoMigration=True)
    one.create()
    return one


@pytest.fixture
def cluster():
    return Cluster()


def test_from_none_to_submitted(server, cluster, tmp_path):
    phases = []
    agent = cluster.agent(server, tmp_path, Pods())
    put = agent.client.put_status

    def note(one):
        phases.append(one["status"]["phase"])
        return put(one)

    agent.client.put_status = note
    agent.settle()
    assert phases == ["Pending", "Checkpointing", "Submitting", "Submitted"]
    assert cluster.deleted == ["p1"]
    assert cluster.restores.kept[KEY]["spec"] == {"checkpointName": "one", "ownerRef": JOB}
    assert server.status()["conditions"][0]["status"] == "True"
    assert "finishedAt" in server.status()
    assert holds_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["create", "created", "delete", "deleted"])
@pytest.mark.parametrize("by", ["itself", "another"])
def test_killed_between_the_steps(server, cluster, tmp_path, where, by):
    cluster.dies = where
    pods = Pods()
    with pytest.raises(Killed):
        cluster.agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Submitting"
    if by == "itself":
        cluster.agent(server, tmp_path, pods).settle()
    else:  # nothing in it is the lost node's own
        other = cluster.agent(server, tmp_path, Pods(None), node="n2")
        other.step()
        other.spells.since = {key: since - 1000 for key, since in other.spells.since.items()}
        other.settle()
    assert server.status()["phase"] == "Submitted"
    assert server.status()["nodeName"] == "n1"
    assert cluster.deleted == ["p1"]
    assert len(cluster.restores.kept) == 1
    assert pods.saves == 1


@pytest.mark.parametrize("changed", ["owner", "uid", "gone"])
def test_refused_before_anything_is_done(server, cluster, tmp_path, changed):
    if changed == "owner":
        cluster.pod["metadata"]["ownerReferences"] = [{**JOB, "controller": False}]
    elif changed == "uid":
        cluster.pod["metadata"]["uid"] = "p2"
    else:
        cluster.pod = None
    pods = Pods()
    cluster.agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Failed"
    assert server.status()["conditions"][0]["reason"] == "CannotMigrate"
    assert pods.saves == 0


def test_a_pod_that_went_meanwhile(server, cluster, tmp_path):
    pods = Pods()
    pods.during = lambda: setattr(cluster, "pod", None)
    cluster.agent(server, tmp_path, pods).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert "make a Restore of one" in server.message()
    assert holds_checkpoint(tmp_path)


@pytest.mark.parametrize("how", ["another's", "failed", "untaken"])
def test_the_pod_stays_if_its_restore_would_not_come(server, cluster, tmp_path, how):
    if how == "another's":  # of an earlier Checkpoint of that name
        cluster.restores.create(checkpointName="one")
        cluster.restores.kept[KEY]["status"] = {"phase": "Restored"}
    cluster.takes_up = {"another's": "Created", "failed": "Failed", "untaken": ""}[how]
    cluster.agent(server, tmp_path, Pods(), lease_seconds=0.5).settle()
    assert server.status()["phase"] == "Checkpointed"
    assert server.status()["conditions"][0]["reason"] == "NotMigrated"
    assert "The checkpoint is whole" in server.message()
    assert cluster.deleted == []


def test_files_that_are_read_stay(server, cluster, tmp_path):
    agent = cluster.agent(server, tmp_path, Pods())
    agent.settle()
    status = cluster.restores.kept[KEY]["status"]
    status["phase"] = "Restoring"
    server.mark_deleted()
    agent.settle()
    assert holds_checkpoint(tmp_path)
    assert "the Restore default/one reads the files" in server.message()
    status["phase"] = "Restored"
    agent.settle()
    assert not server.kept
    assert not holds_checkpoint(tmp_path)
