"""The life of a Restore, as far as the agent of one node moves it.

    (none)       new. The first agent to see it looks whether its Checkpoint can be used
    Created      no pod yet. Every agent has it pending, so that containers of its namespace ask
    Pending      a pod was found by the agent of its node, which holds the claim; nothing was told
    Restoring    the pod's shim was told where the checkpoint is
    Restored     every container that was saved runs again
    Failed       the condition says why. A pod that was claimed does not start while this is there

Every write names the version that it changes, so of all pods and nodes one is first. What was told
is in the status before it is told: an agent that was killed answers the same when it is back.
"""

from __future__ import annotations

import threading
import time

from shim.agent import fitting
from shim.agent.api import ApiError, Conflict, Unanswered
from shim.agent.status import name_of, now, set_phase
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl import stored
from shim.gritctl.containerd import ContainerdError
from shim.gritctl.stored import NotACheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Api, Object, PodsApi
    from shim.agent.desk import Desk
    from shim.agent.pods import Pods, Starting
    from shim.agent.settings import Settings
    from shim.gritctl.stored import Stored

CONDITION = "Restored"
LOST = "NodeLost"
_AGAIN_SECONDS = 1.0
_HELD = (
    "The pod does not start as long as this Restore is there: delete it, and the pod starts from "
    "its beginning"
)


class Restores:
    """`step` looks at all Restores once; `attend` at what the shims of this node have to say, and
    is to be called several times a second. Neither waits for a restore; both may be called by any
    thread. `say` takes lines for the log."""

    def __init__(
        self,
        api: Api,
        checkpoints: Api,
        api_pods: PodsApi,
        pods: Pods,
        desk: Desk,
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        self.api, self.checkpoints, self.api_pods = api, checkpoints, api_pods
        self.pods, self.desk = pods, desk
        self.settings, self.say = settings, say
        self._since: dict[tuple[str, str], float] = {}
        self._renewed: dict[str, float] = {}
        self._not_before = 0.0
        self._heard: set[str] = set()
        self._lock = threading.Lock()

    def step(self) -> str:
        """Returns the version to wait from. Raises ApiError."""
        with self._lock:
            try:
                every, version = self.api.list()
            except ApiError:
                self._since.clear()  # silence while nobody could write is no sign of death
                raise
            before, self._since = self._since, {}
            here = self._here(every)
            pending = set()
            for one in every:
                meta = one["metadata"]
                try:
                    asked_for = self._look(one, before, here)
                except Conflict:
                    asked_for = True  # somebody was faster; it is looked at again
                except Unanswered:
                    raise
                except ApiError as error:
                    self.say(f"restore {name_of(one)}: {error}; looked at again")
                    asked_for = True
                except Exception as error:  # a status that others have filled; the rest must go on
                    self.say(f"restore {name_of(one)}: {type(error).__name__}: {error}")
                    asked_for = False
                if asked_for:
                    pending.add((meta["namespace"], meta["uid"]))
            self.desk.publish(pending, self._running)
            if self.desk.outcomes():
                self._try("the end of a restore", self._conclude)
            return version

    def attend(self) -> None:
        """Answers the containers that ask, and writes down how restores ended."""
        if time.monotonic() < self._not_before:
            return
        with self._lock:
            for container in sorted(self.desk.questions()):
                self._try(f"the question of container {container}", self._answer, container)
            if self.desk.outcomes().keys() - self._heard:
                self._try("the end of a restore", self._conclude)

    def _try(self, what: str, act: Callable[..., None], *words: str) -> None:
        try:
            act(*words)
        except Conflict:
            pass  # somebody was faster: the same again
        except Exception as error:
            kind = "" if isinstance(error, ApiError | ContainerdError) else type(error).__name__
            self.say(f"{what}: {kind} {error}; looked at again")
            self._not_before = time.monotonic() + _AGAIN_SECONDS

    # --- resources ------------------------------------------------------------------------

    def _here(self, every: list[Object]) -> set[str]:
        """The uids of this node's pods, where a Restore was claimed for one of them; all that were
        claimed while containerd does not say."""
        ours = {one["status"].get("podUID", "") for one in every if self._ours(one)}
        try:
            return ours and self.pods.uids()
        except ContainerdError as error:
            self.say(f"{error}; looked at again")
            return ours

    def _running(self) -> set[str]:
        try:
            return self.pods.running()
        except ContainerdError as error:
            self.say(f"which pods run already is not known: {error}")
            return set()

    def _look(self, one: Object, before: dict[tuple[str, str], float], here: set[str]) -> bool:
        """Moves one Restore on; whether containers of its namespace have to ask here."""
        status = one.get("status") or {}
        phase, holder = status.get("phase"), status.get("holder") or {}
        if "deletionTimestamp" in one["metadata"] or phase == "Restored":
            return False
        if phase == "Failed":
            if not self._ours(one) or status.get("podUID") not in here:
                return False
            if _reason(one) == LOST:
                self._go_on(one)
            return True
        if not phase:
            return self._accept(one)
        if phase == "Created":
            return True
        if self._ours(one):
            self._watch(one, before, status["podUID"] in here)
            return True
        if self._seen(one, str(holder.get("until")), before) > self.settings.lease_seconds:
            self._lost(one)
        return False

    def _accept(self, one: Object) -> bool:
        found = self._checkpoint_of(one)
        refused = fitting.unusable(one["spec"]["checkpointName"], found)
        if refused:
            self._fail(one, *refused)
            return False
        set_phase(one, "Created", CONDITION, "Waiting", "no pod that it means has started yet")
        self.api.put_status(one)
        return True

    def _watch(self, one: Object, before: dict[tuple[str, str], float], there: bool) -> None:
        """What can befall a Restore of ours: its pod goes, or a container never comes."""
        meta, status = one["metadata"], one["status"]
        if not there:
            if self._seen(one, "gone", before) > self.settings.pod_wait_seconds:
                if status["phase"] == "Pending":
                    self._release(one)
                else:
                    text = f"pod {status['targetPod']} was removed before all of it ran again"
                    self._fail(one, "PodGone", f"{text}. Make another Restore for its successor")
            return
        waited = self._seen(one, "restoring", before)
        if status["phase"] == "Restoring" and waited > self.settings.restore_seconds:
            self._fail(
                one,
                "TimedOut",
                f"not all containers that were saved have come back in pod {status['targetPod']} "
                f"within {self.settings.restore_seconds:g} s. Has it all of them, and what does "
                "kubectl describe pod say of those?",
            )
        elif time.monotonic() - self._renewed.get(meta["uid"], 0) > self.settings.lease_seconds / 3:
            status["holder"] = self._holder()
            self._put(one)

    def _go_on(self, one: Object) -> None:
        """Others have taken us for dead, and nobody else knows how the restore ended."""
        text = f"node {self.settings.node} was taken for lost, and is back"
        set_phase(one, "Restoring", CONDITION, "Running", text)
        one["status"].pop("finishedAt", None)
        one["status"]["holder"] = self._holder()
        self._put(one)

    def _lost(self, one: Object) -> None:
        status = one["status"]
        if status["phase"] == "Pending":
            self._release(one)
            return
        self._fail(
            one,
            LOST,
            f"the agent on node {status.get('nodeName')} has not been heard of for "
            f"{self.settings.lease_seconds:g} s, while it restored pod {status.get('targetPod')}. "
            "Whether that runs is not known: look at that node. If its agent comes back, it tells",
        )

    def _release(self, one: Object) -> None:
        """Nothing was told to anybody: another pod may have it."""
        status = one["status"]
        text = f"pod {status['targetPod']} went before anything was restored; waits for another"
        for key in ("holder", "nodeName", "podUID", "targetPod"):
            status.pop(key, None)
        set_phase(one, "Created", CONDITION, "Waiting", text)
        self.api.put_status(one)

    def _seen(self, one: Object, what: str, before: dict[tuple[str, str], float]) -> float:
        """For how many seconds `what` has been so."""
        key = (one["metadata"]["uid"], what)
        self._since[key] = before.get(key, time.monotonic())
        return time.monotonic() - self._since[key]

    # --- containers that ask --------------------------------------------------------------

    def _answer(self, container: str) -> None:
        starting = self.pods.starting(container)
        if starting is None:
            self.desk.forget(container)
            return
        every = [
            one
            for one in self.api.list()[0]
            if one["metadata"]["namespace"] == starting.namespace
            and "deletionTimestamp" not in one["metadata"]
        ]
        if not starting.uid:  # no kubelet has made it
            every = []
        claimed = [one for one in every if one.get("status", {}).get("podUID") == starting.uid]
        if claimed:
            self.desk.answer(container, self._of_claimed(claimed[0], starting))
            return
        for one in sorted(every, key=_age):
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
            try:
                pod = self.api_pods.get(starting.namespace, starting.pod)
            except Unanswered:
                raise
            except ApiError as error:  # no right to: that must not hold up the namespace's pods
                self.say(f"the owner of pod {starting.pod} is not known: {error}")
                return set()
            if pod is None or pod["metadata"]["uid"] != starting.uid:
                return set()
            return {each["uid"] for each in pod["metadata"].get("ownerReferences") or []}

        return fitting.means(one, starting, owners)

    def _claim(self, one: Object, starting: Starting) -> Object | None:
        """The Restore, ours for this pod; None if the pod is not one that it can mean."""
        checkpoint = self._checkpoint_of(one)
        refused = fitting.unusable(one["spec"]["checkpointName"], checkpoint)
        if refused or checkpoint is None:
            if refused:
                self._fail(one, *refused)
            return None
        if checkpoint["status"].get("podUID") == starting.uid:
            return None  # it is no successor of itself
        try:
            saved = self._saved(checkpoint["status"]["dataPath"])
        except (CheckpointDirError, NotACheckpoint):
            saved = None  # told as soon as the pod is ours
        if saved is not None:
            if not _of_name(saved, starting.name):
                return None
            differs = fitting.other_program(_of_name(saved, starting.name)[0], starting)
            if differs:
                text = f"{differs}: not taken for the one that is meant; waits for another"
                if _condition(one).get("message") != text:
                    set_phase(one, "Created", CONDITION, "OtherProgram", text)
                    self.api.put_status(one)
                return None
        text = f"pod {starting.pod} on node {self.settings.node}"
        set_phase(one, "Pending", CONDITION, "Claimed", text)
        one["status"] |= {
            "holder": self._holder(),
            "nodeName": self.settings.node,
            "targetPod": starting.pod,
            "podUID": starting.uid,
        }
        self.say(f"restore {name_of(one)} is claimed for {text}")
        return self._put(one)

    def _of_claimed(self, one: Object, starting: Starting) -> dict[str, Any]:
        """What a container of a pod that was claimed is told."""
        status = one["status"]
        if status["phase"] == "Pending" and self._ours(one):
            begun = self._begin(one)
            if begun is None:
                return {}
            one, status = begun, begun["status"]
        if status["phase"] == "Failed":
            return _refused(one)
        if status["phase"] != "Restoring" or not self._ours(one):
            return {}
        checkpoint = self._checkpoint_of(one)
        try:
            directory = checkpoint["status"]["dataPath"] if checkpoint else ""
            mine = _of_name(self._saved(directory), starting.name)
        except (CheckpointDirError, NotACheckpoint) as error:
            self._fail(one, "FilesMissing", f"{error}. {_HELD}")
            return _refused(one)
        if not mine:
            return {}
        differs = fitting.other_program(mine[0], starting)
        if differs:
            self._fail(one, "OtherProgram", f"{differs}. {_HELD}")
            return _refused(one)
        return {"directory": directory, "restore": one["metadata"]["uid"]}

    def _begin(self, one: Object) -> Object | None:
        """Pending: to Restoring, or to Failed if the files are not to be had here. None if the
        Restore has gone."""
        checkpoint = self._checkpoint_of(one)
        refused = fitting.unusable(one["spec"]["checkpointName"], checkpoint)
        directory = "" if refused or checkpoint is None else checkpoint["status"]["dataPath"]
        try:
            if directory:
                self._saved(directory)
        except (CheckpointDirError, NotACheckpoint) as error:
            node = checkpoint["status"].get("nodeName") if checkpoint else ""
            refused = (
                "FilesMissing",
                f"the files are not on node {self.settings.node}: {error}. They were written on "
                f"node {node}: a store that all nodes mount (volumeClaim) brings them along, or "
                "have the pod scheduled there",
            )
        if refused:
            reason, text = refused
            self._fail(one, reason, f"{text}. {_HELD}")
            return one
        text = f"from {directory}"
        set_phase(one, "Restoring", CONDITION, "Running", text)
        one["status"]["holder"] = self._holder()
        return self._put(one)

    # --- how it ended ---------------------------------------------------------------------

    def _conclude(self) -> None:
        """Writes down what the shims have told, and forgets what nobody waits for."""
        told: dict[str, dict[str, dict[str, Any]]] = {}
        all_told = self.desk.outcomes()
        for container, outcome in all_told.items():
            told.setdefault(str(outcome.get("restore")), {})[container] = outcome
        known = {one["metadata"]["uid"]: one for one in self.api.list()[0]}
        for uid, outcomes in told.items():
            one = known.get(uid)
            if one and self._ours(one) and _reason(one) == LOST:
                continue  # the next look goes on with it
            if (
                one is None
                or one.get("status", {}).get("phase") != "Restoring"
                or self._ended(one, list(outcomes.values()))
            ):
                for container in outcomes:
                    self.desk.forget(container)
        self._heard = set(all_told)

    def _ended(self, one: Object, outcomes: list[dict[str, Any]]) -> bool:
        errors = [outcome["error"] for outcome in outcomes if outcome["error"]]
        if errors:
            self._fail(one, "RestoreFailed", f"{'; '.join(errors)}. {_HELD}")
            return True
        checkpoint = self._checkpoint_of(one)
        names = {str(outcome["name"]) for outcome in outcomes}
        try:
            path = checkpoint["status"]["dataPath"] if checkpoint else ""
            wanted = {name for name in self._saved(path) if name}
        except (CheckpointDirError, NotACheckpoint):
            wanted = set()  # the files have gone meanwhile: those that were told run
        missing = wanted - names
        if missing:
            return False
        text = f"{', '.join(sorted(names))} of pod {one['status'].get('targetPod')} run again"
        set_phase(one, "Restored", CONDITION, "Complete", text)
        one["status"]["finishedAt"] = now()
        self.api.put_status(one)
        self.say(f"restore {name_of(one)}: {text}")
        return True

    def _fail(self, one: Object, reason: str, text: str) -> None:
        set_phase(one, "Failed", CONDITION, reason, text)
        one["status"]["finishedAt"] = now()
        self.api.put_status(one)
        self.say(f"restore {name_of(one)} failed: {text}")

    # --- what is there --------------------------------------------------------------------

    def _checkpoint_of(self, one: Object) -> Object | None:
        return self.checkpoints.get(one["metadata"]["namespace"], one["spec"]["checkpointName"])

    def _saved(self, directory: str) -> dict[str, Stored]:
        """The containers that were saved, by name; "" for one that was saved alone. Raises
        CheckpointDirError or NotACheckpoint."""
        if not self.settings.holds(directory):
            raise NotACheckpoint(f"{directory} is in no store of this agent")
        return {one.name: one for one in stored.open_all(directory)}

    def _put(self, one: Object) -> Object | None:
        self._renewed[one["metadata"]["uid"]] = time.monotonic()
        return self.api.put_status(one)

    def _ours(self, one: Object) -> bool:
        found: str = one.get("status", {}).get("nodeName", "")
        return found == self.settings.node

    def _holder(self) -> dict[str, Any]:
        return {"name": self.settings.node, "until": now(self.settings.lease_seconds)}


def _reason(one: Object) -> str:
    return str(_condition(one).get("reason", ""))


def _refused(one: Object) -> dict[str, Any]:
    why = _condition(one).get("message")
    return {"refused": f"the Restore {name_of(one)} for this pod has failed: {why}"}


def _condition(one: Object) -> dict[str, Any]:
    found = one.get("status", {}).get("conditions", [])
    return next((each for each in found if each["type"] == CONDITION), {})


def _of_name(saved: dict[str, Stored], name: str) -> list[Stored]:
    return [one for one in (saved.get(name), saved.get("")) if one]


def _age(one: Object) -> tuple[str, str]:
    return (one["metadata"].get("creationTimestamp", ""), name_of(one))
