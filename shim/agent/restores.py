"""The life of a Restore, as far as the agent of one node moves it.

    (none)       new. The first agent to see it looks whether its Checkpoint can be used
    Created      no pod yet. Every agent has it pending, so that containers of its namespace ask
    Pending      a pod was found by the agent of its node, which holds the claim; nothing was told
    Restoring    the pod's shim was told where the checkpoint is
    Restored     every container that was saved runs again
    Failed       the condition says why. A pod that was claimed does not start while this is there

Every write names the version that it changes, so of all pods and nodes one is first.
"""

from __future__ import annotations

import threading
import time

from shim.agent import fitting
from shim.agent.answers import Answers
from shim.agent.api import ApiError, Conflict, Unanswered
from shim.agent.claims import CONDITION, HELD, Claims, condition
from shim.agent.spells import Spells
from shim.agent.status import name_of, set_phase
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl.containerd import ContainerdError
from shim.gritctl.stored import NotACheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Api, Object, PodsApi
    from shim.agent.desk import Desk
    from shim.agent.pods import Pods
    from shim.agent.settings import Settings

LOST = "NodeLost"
_AGAIN_SECONDS = 1.0
_ANNOTATED = (
    "The pod is annotated with the checkpoint, and does not start without it: delete the pod; its "
    "successor starts from its beginning"
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
        self.api, self.pods, self.desk = api, pods, desk
        self.settings, self.say = settings, say
        self.claims = Claims(api, checkpoints, settings, say)
        self.answers = Answers(self.claims, api_pods, pods, desk)
        self.spells = Spells()
        self._not_before = 0.0
        self._heard: set[str] = set()
        self._lock = threading.Lock()

    def step(self) -> str:
        """Returns the version to wait from. Raises ApiError."""
        with self._lock:
            try:
                every, version = self.api.list()
            except ApiError:
                self.spells.forget()
                raise
            self.spells.look()
            here = self._here(every)
            pending = set()
            for one in every:
                meta = one["metadata"]
                try:
                    asked_for = self._look(one, here)
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
                self._try(f"the question of container {container}", self.answers.answer, container)
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
        ours = {one["status"].get("podUID", "") for one in every if self.claims.ours(one)}
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

    def _look(self, one: Object, here: set[str]) -> bool:
        """Moves one Restore on; whether containers of its namespace have to ask here."""
        status = one.get("status") or {}
        phase, holder = status.get("phase"), status.get("holder") or {}
        if "deletionTimestamp" in one["metadata"] or phase == "Restored":
            return False
        if phase == "Failed":
            if not self.claims.ours(one) or status.get("podUID") not in here:
                return False
            if _reason(one) == LOST:
                self._go_on(one)
            return True
        if not phase:
            return self._accept(one)
        if phase == "Created":
            return True
        if not holder:  # the webhook has annotated a pod, which asks nothing
            return False
        if self.claims.ours(one):
            self._watch(one, status["podUID"] in here)
            return True
        if self.spells.seconds(one, str(holder.get("until"))) > self.settings.lease_seconds:
            self._lost(one)
        return False

    def _accept(self, one: Object) -> bool:
        found = self.claims.checkpoint_of(one)
        refused = fitting.unusable(one["spec"]["checkpointName"], found)
        if refused:
            reason, text = refused
            told = f"{text}. No pod was touched; make another Restore"
            self.claims.fail(one, reason, told)
            return False
        self.claims.move(one, "Created", "Waiting", "no pod that it means has started yet")
        return True

    def _watch(self, one: Object, there: bool) -> None:
        """What can befall a Restore of ours: its pod goes, or a container never comes."""
        status = one["status"]
        if not there:
            if self.spells.seconds(one, "gone") > self.settings.pod_wait_seconds:
                if status["phase"] == "Pending":
                    self._release(one)
                else:
                    text = f"pod {status['targetPod']} was removed before all of it ran again"
                    self.claims.fail(
                        one, "PodGone", f"{text}. Make another Restore for its successor"
                    )
            return
        waited = self.spells.seconds(one, "restoring")
        if status["phase"] == "Restoring" and waited > self.settings.restore_seconds:
            self.claims.fail(
                one,
                "TimedOut",
                f"not all containers that were saved have come back in pod {status['targetPod']} "
                f"within {self.settings.restore_seconds:g} s. Has it all of them, and what does "
                "kubectl describe pod say of those?",
            )
        else:
            self.claims.renew(one)

    def _go_on(self, one: Object) -> None:
        """Others have taken us for dead, and nobody else knows how the restore ended."""
        text = f"node {self.settings.node} was taken for lost, and is back"
        set_phase(one, "Restoring", CONDITION, "Running", text)
        one["status"].pop("finishedAt", None)
        self.claims.hold(one)

    def _lost(self, one: Object) -> None:
        status = one["status"]
        if status["phase"] == "Pending":
            self._release(one)
            return
        self.claims.fail(
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
        self.claims.move(one, "Created", "Waiting", text)

    # --- how it ended ---------------------------------------------------------------------

    def _conclude(self) -> None:
        """Writes down what the shims have told, and forgets what nobody waits for."""
        told: dict[str, dict[str, dict[str, Any]]] = {}
        all_told = self.desk.outcomes()
        known = {one["metadata"]["uid"]: one for one in self.api.list()[0]}
        for container, outcome in all_told.items():
            uid = str(outcome.get("restore"))
            if uid in known and _elsewhere(known[uid], outcome):
                self.desk.forget(container)  # a pod may be annotated with what is not its own
            else:
                told.setdefault(uid, {})[container] = outcome
        for uid, outcomes in told.items():
            one = known.get(uid)
            if one and self.claims.ours(one) and _reason(one) == LOST:
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
            held = HELD if one["status"].get("holder") else _ANNOTATED
            self.claims.fail(one, "RestoreFailed", f"{'; '.join(errors)}. {held}")
            return True
        checkpoint = self.claims.checkpoint_of(one)
        names = {str(outcome["name"]) for outcome in outcomes}
        try:
            path = checkpoint["status"]["dataPath"] if checkpoint else ""
            wanted = {name for name in self.claims.saved(path) if name}
        except (CheckpointDirError, NotACheckpoint) as error:
            self.say(f"which containers restore {name_of(one)} waits for is not known: {error}")
            return False
        if wanted - names:
            return False
        text = f"{', '.join(sorted(names))} of pod {one['status'].get('targetPod')} run again"
        self.claims.move(one, "Restored", "Complete", text)
        return True


def _elsewhere(one: Object, outcome: dict[str, Any]) -> bool:
    namespace = one["metadata"]["namespace"]
    return bool(outcome.get("namespace", namespace) not in ("", namespace))


def _reason(one: Object) -> str:
    return str(condition(one).get("reason", ""))
