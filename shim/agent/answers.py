"""What containers are told that are about to be created on this node: whether a Restore means them.

A Restore is claimed for a pod before any of its containers is told, and what was told is in the
status before it is told: an agent that was killed answers the same when it is back.
"""

from __future__ import annotations

from shim.agent import fitting, podspec
from shim.agent.api import ApiError, Unanswered
from shim.agent.claims import CONDITION, HELD, condition
from shim.agent.status import age, name_of, set_phase
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl.stored import NotACheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.agent.api import Object, PodsApi
    from shim.agent.claims import Claims
    from shim.agent.desk import Desk
    from shim.agent.pods import Pods, Starting
    from shim.gritctl.stored import Stored


class Answers:
    """`api_pods` are the API server's pods, `pods` those of this node in containerd."""

    def __init__(self, claims: Claims, api_pods: PodsApi, pods: Pods, desk: Desk) -> None:
        self.claims, self.api_pods, self.pods, self.desk = claims, api_pods, pods, desk

    def answer(self, container: str) -> None:
        """Answers one container, by what containerd knows of it and its pod. Raises ApiError,
        ContainerdError or OSError: the question stays open."""
        starting = self.pods.starting(container)
        if starting is None:
            self.desk.forget(container)
            return
        every = [
            one
            for one in self.claims.api.list()[0]
            if one["metadata"]["namespace"] == starting.namespace
            and "deletionTimestamp" not in one["metadata"]
        ]
        if not starting.uid:  # no kubelet has made it
            every = []
        claimed = [one for one in every if one.get("status", {}).get("podUID") == starting.uid]
        if claimed:
            self.desk.answer(container, self._of_claimed(claimed[0], starting))
            return
        for one in sorted(every, key=age):
            if self._means(one, starting):
                taken = self._claim(one, starting)
                if taken:
                    self.desk.answer(container, self._of_claimed(taken, starting))
                    return
        self.desk.answer(container, {})

    def _means(self, one: Object, starting: Starting) -> bool:
        if one.get("status", {}).get("phase") != "Created":
            return False
        if starting.uid in self.desk.ran_before(one["metadata"]["uid"]):
            return False  # a container that ended is not a pod that starts

        def owners() -> set[str]:
            pod = self._pod(starting)
            found = pod["metadata"].get("ownerReferences") if pod else None
            return {each["uid"] for each in found or []}

        return fitting.means(one, starting.labels, owners)

    def _pod(self, starting: Starting) -> Object | None:
        """As the API server has it, None if it does not say. Raises Unanswered."""
        try:
            pod = self.api_pods.get(starting.namespace, starting.pod)
        except Unanswered:
            raise
        except ApiError as error:  # no right to: that must not hold up the namespace's pods
            self.claims.say(f"owner and specification of pod {starting.pod} are not known: {error}")
            return None
        return pod if pod and pod["metadata"]["uid"] == starting.uid else None

    def _claim(self, one: Object, starting: Starting) -> Object | None:
        """The Restore, ours for this pod; None if the pod is not one that it can mean."""
        checkpoint = self.claims.checkpoint_of(one)
        if checkpoint and not fitting.unusable(checkpoint["metadata"]["name"], checkpoint):
            if checkpoint["status"].get("podUID") == starting.uid:
                return None  # it is no successor of itself
            try:
                saved = self.claims.saved(checkpoint["status"]["dataPath"])
            except (CheckpointDirError, NotACheckpoint):
                pass  # told as soon as the pod is ours
            else:
                if not self._is_saved(one, checkpoint, saved, starting):
                    return None
        text = f"pod {starting.pod} on node {self.claims.settings.node}"
        set_phase(one, "Pending", CONDITION, "Claimed", text)
        one["status"] |= {
            "nodeName": self.claims.settings.node,
            "targetPod": starting.pod,
            "podUID": starting.uid,
        }
        self.claims.say(f"restore {name_of(one)} is claimed for {text}")
        return self.claims.hold(one)

    def _is_saved(
        self, one: Object, checkpoint: Object, saved: dict[str, Stored], starting: Starting
    ) -> bool:
        """Whether the container is one of those saved, and its pod such a one; what differs is
        told."""
        of_name = _of_name(saved, starting.name)
        if not of_name:
            return False
        reason, differs = "OtherProgram", fitting.other_program(of_name[0], starting)
        if not differs:
            reason, differs = "OtherSpec", self._other_spec(checkpoint, starting)
        text = f"{differs}: not taken for the one that is meant; waits for another"
        if differs and condition(one).get("message") != text:
            self.claims.move(one, "Created", reason, text)
        return not differs

    def _other_spec(self, checkpoint: Object, starting: Starting) -> str:
        """How the pod is specified otherwise than the one saved, as far as both are known."""
        parts = checkpoint["status"].get("podSpecParts")
        pod = self._pod(starting) if parts else None
        differs = podspec.differences(parts, podspec.parts(pod["spec"])) if pod else ""
        return differs and f"pod {starting.pod} is not as the one saved: it {differs}"

    def _of_claimed(self, one: Object, starting: Starting) -> dict[str, Any]:
        """What a container of a pod that was claimed is told."""
        status = one["status"]
        if status["phase"] == "Pending" and self.claims.ours(one):
            begun = self._begin(one)
            if begun is None:
                return {}
            one, status = begun, begun["status"]
        if status["phase"] == "Failed":
            return _refused(one)
        if status["phase"] != "Restoring" or not self.claims.ours(one):
            return {}
        checkpoint = self.claims.checkpoint_of(one)
        try:
            directory = checkpoint["status"]["dataPath"] if checkpoint else ""
            mine = _of_name(self.claims.saved(directory), starting.name)
        except (CheckpointDirError, NotACheckpoint) as error:
            self.claims.fail(one, "FilesMissing", f"{error}. {HELD}")
            return _refused(one)
        if not mine:
            return {}
        differs = fitting.other_program(mine[0], starting)
        if differs:
            self.claims.fail(one, "OtherProgram", f"{differs}. {HELD}")
            return _refused(one)
        return {"directory": directory, "restore": one["metadata"]["uid"]}

    def _begin(self, one: Object) -> Object | None:
        """Pending: to Restoring, or to Failed if the files are not to be had here. None if the
        Restore has gone."""
        checkpoint = self.claims.checkpoint_of(one)
        refused = fitting.unusable(one["spec"]["checkpointName"], checkpoint)
        if checkpoint and not refused:
            refused = self._missing(checkpoint)
        if refused:
            reason, text = refused
            self.claims.fail(one, reason, f"{text}. {HELD}")
            return one
        set_phase(one, "Restoring", CONDITION, "Running", "its shim knows where the files are")
        return self.claims.hold(one)

    def _missing(self, checkpoint: Object) -> tuple[str, str] | None:
        """Reason and message if the files are not to be had on this node."""
        try:
            self.claims.saved(checkpoint["status"]["dataPath"])
        except (CheckpointDirError, NotACheckpoint) as error:
            return (
                "FilesMissing",
                f"the files are not on node {self.claims.settings.node}: {error}. They were "
                f"written on node {checkpoint['status'].get('nodeName')}: a store that all nodes "
                "mount (volumeClaim) brings them along, or have the pod scheduled there",
            )
        return None


def _refused(one: Object) -> dict[str, Any]:
    why = condition(one).get("message")
    return {"refused": f"the Restore {name_of(one)} for this pod has failed: {why}"}


def _of_name(saved: dict[str, Stored], name: str) -> list[Stored]:
    return [one for one in (saved.get(name), saved.get("")) if one]
