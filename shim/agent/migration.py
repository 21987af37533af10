"""What Restores have to do with a Checkpoint. With autoMigration one is made for whatever the pod's
controller makes in its place, and the pod deleted: every step may be done again, by any node's
agent. And as long as one reads the files, these stay.
"""

from __future__ import annotations

from shim.agent.api import GROUP, VERSION
from shim.agent.status import name_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.agent.api import Api, Object, PodsApi


class NotMigrated(Exception):
    """The pod was not deleted, or is gone without a Restore; the message says what to do."""


class Migration:
    """All raise ApiError. `restores` and `pods` are the API server's."""

    def __init__(self, restores: Api, pods: PodsApi) -> None:
        self._restores, self._pods = restores, pods

    def refused(self, checkpoint: Object) -> str:
        """Why the pod cannot be migrated, "" if it can."""
        pod = self.pod(checkpoint)
        if pod is None:
            return (
                "the API server knows no such pod of that uid, so nobody would make its successor"
            )
        if _controller(pod) is None:
            return (
                "the pod has no controller (Job, Deployment, StatefulSet ...), so nobody would "
                "make its successor: leave autoMigration out, delete the pod and make a Restore "
                "and the new pod by hand"
            )
        return ""

    def reader_of(self, checkpoint: Object) -> str:
        """A Restore that reads the files of the Checkpoint at this time, "" if none does."""
        meta = checkpoint["metadata"]
        for one in self._restores.list()[0]:
            same = one["metadata"]["namespace"] == meta["namespace"]
            reads = one.get("status", {}).get("phase") in ("Pending", "Restoring")
            if same and reads and one["spec"]["checkpointName"] == meta["name"]:
                return name_of(one)
        return ""

    def submit(self, checkpoint: Object, wait: Callable[[], bool]) -> str:
        """Makes the Restore, has all agents know of it, then deletes the pod; what was done.
        `wait` lets some time pass, and says that there is none left. Raises NotMigrated."""
        meta, pod = checkpoint["metadata"], self.pod(checkpoint)
        if pod is not None:
            self._restores.create(_restore(checkpoint, pod))
        while True:
            restore = self._restores.get(meta["namespace"], meta["name"])
            if restore is None or not _is_of(restore, checkpoint):
                raise NotMigrated(_by_hand(checkpoint, restore))
            phase = restore.get("status", {}).get("phase")
            if phase == "Failed" and pod is not None:
                raise NotMigrated(
                    f"the Restore {name_of(restore)} has failed (kubectl describe rst "
                    f"{meta['name']}), so the pod was not deleted for its sake"
                )
            if phase:
                break
            if wait():
                raise NotMigrated(f"no agent has taken up the Restore {name_of(restore)}")
        if pod is not None:
            self._pods.delete(pod)
        name = checkpoint["spec"]["podName"]
        return f"pod {name} is deleted; the Restore {name_of(restore)} waits for its successor"

    def pod(self, checkpoint: Object) -> Object | None:
        """The very pod that is saved, None if it has gone."""
        meta = checkpoint["metadata"]
        pod = self._pods.get(meta["namespace"], checkpoint["spec"]["podName"])
        if pod is None or pod["metadata"]["uid"] != checkpoint["status"].get("podUID"):
            return None
        return pod


def _controller(pod: Object) -> Object | None:
    owners: list[Object] = pod["metadata"].get("ownerReferences") or []
    return next((one for one in owners if one.get("controller")), None)


def _is_of(restore: Object, checkpoint: Object) -> bool:
    """Whether it is this Checkpoint's own, not one of an earlier Checkpoint of that name."""
    owners = restore["metadata"].get("ownerReferences") or []
    return any(each["uid"] == checkpoint["metadata"]["uid"] for each in owners)


def _restore(checkpoint: Object, pod: Object) -> Object:
    meta = checkpoint["metadata"]
    version = f"{GROUP}/{VERSION}"
    of = {"apiVersion": version, "kind": "Checkpoint", "name": meta["name"], "uid": meta["uid"]}
    return {
        "apiVersion": version,
        "kind": "Restore",
        "metadata": {
            "namespace": meta["namespace"],
            "name": meta["name"],
            "ownerReferences": [of],
        },
        "spec": {"checkpointName": meta["name"], "ownerRef": _controller(pod)},
    }


def _by_hand(checkpoint: Object, restore: Object | None) -> str:
    name = checkpoint["metadata"]["name"]
    if restore is not None:
        return (
            f"there is a Restore {name_of(restore)} already, not made for this Checkpoint, so the "
            "pod was not deleted: make a Restore by another name, then delete the pod"
        )
    return (
        "the pod has gone before a Restore could be made for its successor, which started from its "
        f"beginning: make a Restore of {name}, then delete that pod"
    )
