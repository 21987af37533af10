"""An API server in memory, and connections to it that end when an agent is killed."""

from __future__ import annotations

import copy

from shim.agent.api import ApiError, Conflict

KEY = ("default", "one")


class Killed(BaseException):
    pass


class Server:
    """Keeps resources of one kind as an API server does: versions, finalizers, status apart.
    `spec` is what all have that say nothing else."""

    def __init__(self, **spec):
        self.kept, self.version, self.down = {}, 1, False
        self.spec = spec

    def create(self, name="one", uid="u1", **spec):
        self.version += 1
        self.kept["default", name] = {
            "metadata": {
                "namespace": "default",
                "name": name,
                "uid": uid,
                "resourceVersion": str(self.version),
            },
            "spec": {**self.spec, **spec},
        }

    def mark_deleted(self, key=KEY):
        self.version += 1
        meta = self.kept[key]["metadata"]
        meta |= {"deletionTimestamp": "now", "resourceVersion": str(self.version)}
        if not meta.get("finalizers"):
            del self.kept[key]

    def status(self, key=KEY):
        return self.kept[key].get("status", {})

    def message(self, key=KEY):
        return self.status(key)["conditions"][0]["message"]


class Client:
    """A connection of one agent, which is killed before or after its write number `dies`."""

    def __init__(self, server, dies=None, after=False):
        self.server, self.dies, self.after = server, dies, after
        self.dead, self.writes = False, 0

    def alive(self):
        if self.dead:
            raise Killed
        if self.server.down:
            raise ApiError("down")

    def list(self):
        self.alive()
        return copy.deepcopy(list(self.server.kept.values())), str(self.server.version)

    def get(self, namespace, name):
        self.alive()
        return copy.deepcopy(self.server.kept.get((namespace, name)))

    def create(self, one):
        meta = one["metadata"]
        self.alive()
        if (meta["namespace"], meta["name"]) not in self.server.kept:
            self.server.create(meta["name"], f"uid-{meta['name']}", **one["spec"])
            self.server.kept[meta["namespace"], meta["name"]]["metadata"] |= meta

    def put(self, one):
        return self._put(one, status=False)

    def put_status(self, one):
        return self._put(one, status=True)

    def delete(self, one):
        self.alive()
        self.server.mark_deleted((one["metadata"]["namespace"], one["metadata"]["name"]))

    def _put(self, one, *, status):
        self.alive()
        self.writes += 1
        if self.writes == self.dies and not self.after:
            self.dead = True
            raise Killed
        key = one["metadata"]["namespace"], one["metadata"]["name"]
        kept = self.server.kept.get(key)
        if kept is None:
            return None
        if kept["metadata"]["resourceVersion"] != one["metadata"]["resourceVersion"]:
            raise Conflict("409")
        self.server.version += 1
        if status:
            kept["status"] = copy.deepcopy(one["status"])
        else:
            kept["metadata"] = copy.deepcopy(one["metadata"])
        kept["metadata"]["resourceVersion"] = str(self.server.version)
        if "deletionTimestamp" in kept["metadata"] and not kept["metadata"].get("finalizers"):
            del self.server.kept[key]
        if self.writes == self.dies:
            self.dead = True
            raise Killed
        return copy.deepcopy(kept)
