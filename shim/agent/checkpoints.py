"""The life of a Checkpoint, as far as the agent of one node moves it.

    (none), Created    nobody's. The agent that has the pod puts the finalizer on it and claims it
    Pending            claimed; nothing was done to the pod yet
    Checkpointing      the pod may be paused, the directory may be there, which then is whole
    Checkpointed       the files are there
    Submitting         they are, and the pod's successor is to be restored (autoMigration)
    Submitted          its Restore is made, the pod deleted
    Failed             nothing is there, and the pod runs on or the condition says what does not;
                       failed as NodeLost, its agent finishes or undoes it when it is back

Every write names the version that it changes: of two agents that want the same, one is told that it
came too late. A claim is renewed by writing; others take its holder for dead once they have seen
the same claim for `lease_seconds` by their own clock, so clocks need not agree.
"""

from __future__ import annotations

import datetime
import os
import threading
import time

from shim import checkpoint_dir
from shim.agent import podspec
from shim.agent.api import ApiError, Conflict, Unanswered
from shim.agent.migration import NotMigrated
from shim.agent.settings import UnknownStore
from shim.agent.spells import Spells
from shim.agent.status import name_of as _name
from shim.agent.status import now as _now
from shim.agent.status import set_phase
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl.containerd import ContainerdError
from shim.gritctl.interrupts import Interrupted, Interrupts
from shim.gritctl.progress import Display
from shim.gritctl.saving import SavingError
from shim.gritctl.stored import NotACheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Api, Object
    from shim.agent.migration import Migration
    from shim.agent.pods import Pods
    from shim.agent.settings import Settings
    from shim.gritctl.progress import Phase

FINALIZER = "grit.dev/checkpoint-files"
TTL = "grit.dev/ttl-seconds-after-finished"
CONDITION = "Checkpointed"
LOST = "NodeLost"
ATTEMPTS = 3
_LOOK_SECONDS = 0.2
FINISHED = ("Checkpointed", "Submitted", "Failed")
_NO_MATTER = (ContainerdError, CheckpointDirError, SavingError, NotACheckpoint, OSError)


class Job(Display):
    """A Checkpoint under way here; keeps how far it is."""

    def __init__(self) -> None:
        self.interrupts = Interrupts()
        self.written = time.monotonic()
        self.began = time.monotonic()
        self.bytes: dict[tuple[str, str], int] = {}
        self.now: Phase | None = None
        self.thread: threading.Thread | None = None

    def begun(self, phase: Phase) -> None:
        self.now = phase

    def moved(self, phase: Phase) -> None:
        self.bytes[phase.target, phase.name] = phase.done or 0

    def progress(self) -> dict[str, Any]:
        """`bytes` are those of memory and files written so far."""
        kept = {key: size for key, size in list(self.bytes.items()) if key[1] in ("dump", "rootfs")}
        found: dict[str, Any] = {
            "bytes": sum(kept.values()),
            "seconds": round(time.monotonic() - self.began, 1),
        }
        if self.now:
            found |= {"phase": self.now.name, "container": self.now.target}
        return found


class Checkpoints:
    """`step` looks at all Checkpoints once, begins what is to be begun and renews the claims; it
    never waits for a checkpoint, a store or a containerd that hangs. What takes time has a thread;
    `say` takes lines for the log."""

    def __init__(
        self,
        api: Api,
        pods: Pods,
        migration: Migration,
        settings: Settings,
        say: Callable[[str], None],
    ) -> None:
        self.api, self.pods, self.migration = api, pods, migration
        self.settings, self.say = settings, say
        self.jobs: dict[str, Job] = {}
        self.stopping = threading.Event()
        self._workers = threading.Semaphore(settings.workers)
        self._busy: dict[str, threading.Lock] = {}
        self.spells = Spells()
        self._silent = False  # containerd: it is not asked for every Checkpoint in vain

    def step(self) -> str:
        """Returns the version to wait from. Raises ApiError."""
        try:
            every, version = self.api.list()
        except ApiError:
            self.spells.forget()
            raise
        self.spells.look()
        self._silent = False
        for one in sorted(every, key=lambda one: one["metadata"]["uid"] not in self.jobs):
            try:
                self._look(one)
            except Conflict:
                pass  # somebody was faster; it is looked at again
            except Unanswered:
                raise
            except (ApiError, *_NO_MATTER) as error:
                self._silent |= getattr(error, "code", "") == "DEADLINE_EXCEEDED"
                self.say(f"checkpoint {_name(one)}: {error}; looked at again")
            except Exception as error:  # a status that others have filled; the rest must go on
                self.say(f"checkpoint {_name(one)}: {type(error).__name__}: {error}")
        if not self.jobs:
            self._busy.clear()
        return version

    def stop(self) -> None:
        """Undoes what is under way: an agent that is started again begins it anew."""
        self.stopping.set()
        for job in list(self.jobs.values()):
            job.interrupts.came = True
        for job in list(self.jobs.values()):
            if job.thread:
                job.thread.join()

    def _look(self, one: Object) -> None:
        meta, status = one["metadata"], one.get("status") or {}
        deleted = "deletionTimestamp" in meta
        job = self.jobs.get(meta["uid"])
        if job:
            if deleted or status.get("holder", {}).get("name") != self.settings.node:
                job.interrupts.came = True
            elif time.monotonic() - job.written > self.settings.lease_seconds / 3:
                self._renew(one, job)
            return
        holder = status.get("holder", {})
        mine = holder.get("name") == self.settings.node
        if deleted:
            orphan = self.spells.seconds(one, "deleted") > self.settings.orphan_seconds
            node = status.get("nodeName") or self.settings.node
            if FINALIZER in meta.get("finalizers", []) and (orphan or node == self.settings.node):
                self._begin(one, self._clear)
        elif status.get("phase") in FINISHED:
            if mine and _is_lost(one):
                self._begin(one, self._come_back)
            else:
                self._expire(one)
        elif mine:
            self._begin(one, self._take_on)
        elif holder:
            if self.spells.seconds(one, str(holder.get("until"))) > self.settings.lease_seconds:
                self._take_over(one)
        elif not self._silent:
            self._claim(one)

    def _take_over(self, one: Object) -> None:
        """Its agent is taken for dead. By the version looked at."""
        status = one["status"]
        holder = status["holder"]
        if status.get("phase") == "Submitting":  # nothing in that is the node's own
            status["holder"] = self._holder()
            taken = self.api.put_status(one)
            if taken:
                self._begin(taken, self._take_on)
            return
        self._fail(
            one,
            LOST,
            f"the agent on node {holder['name']} has not been heard of since before "
            f"{holder.get('until')}, while the Checkpoint was {status.get('phase')}. Whether its "
            "pod still runs, and whether there are files, is not known. Look at that node, then "
            "make another Checkpoint. If that agent comes back, it finishes or undoes this one",
            holder=holder,
        )

    def _claim(self, one: Object) -> None:
        meta = one["metadata"]
        # Meanwhile nobody renews: well within a lease.
        uid = self.pods.uid(_pod(one), self.settings.lease_seconds / 6)
        if uid is None:
            waited = self.spells.seconds(one, "no pod")
            if not (one.get("status") or {}).get("phase"):
                text = f"no agent has found pod {_pod(one)} on its node yet"
                _set(one, "Created", "Waiting", text)
                self.api.put_status(one)
            elif waited > self.settings.pod_wait_seconds:
                self._fail(
                    one,
                    "PodNotFound",
                    f"pod {_pod(one)} runs on no node that has an agent: none took this up in "
                    f"{self.settings.pod_wait_seconds:g} s. Is it running, and is the agent on its "
                    "node? Then make another Checkpoint",
                    holder={},
                )
            return
        if FINALIZER not in meta.get("finalizers", []):
            meta["finalizers"] = [*meta.get("finalizers", []), FINALIZER]
            changed = self.api.put(one)
            if changed is None:
                return
            one = changed
        _set(one, "Pending", "Claimed", f"node {self.settings.node} has the pod")
        one["status"] |= {
            "holder": self._holder(),
            "nodeName": self.settings.node,
            "podUID": uid,
        }
        claimed = self.api.put_status(one)
        if claimed:
            self._begin(claimed, self._take_on)

    def _begin(self, one: Object, act: Callable[[Object, Job], None]) -> None:
        job = Job()
        self.jobs[one["metadata"]["uid"]] = job
        job.thread = threading.Thread(target=self._run, args=(one, job, act), daemon=True)
        job.thread.start()

    def _run(self, one: Object, job: Job, act: Callable[[Object, Job], None]) -> None:
        try:
            act(one, job)
        except Conflict:
            pass  # somebody was faster; it is looked at again
        except (ApiError, Interrupted, *_NO_MATTER) as error:
            self.say(f"checkpoint {_name(one)}: {error}; looked at again")
        except Exception as error:
            self.say(f"checkpoint {_name(one)}: {type(error).__name__}: {error}")
        finally:
            del self.jobs[one["metadata"]["uid"]]

    def _take_on(self, one: Object, job: Job) -> None:
        try:
            with self._lock_of(one), self._workers:
                current = self._still_ours(one)
                if current and not job.interrupts.came:
                    self._checkpoint(current, job)
        except (ApiError, Interrupted):
            raise
        except Exception as error:
            text = f"a mistake in the agent: {type(error).__name__}: {error}"
            self._end(one, "Failed", "Internal", text)
            raise

    def _uid(self, one: Object) -> str | None:
        """The pod's, however long containerd is away: the claim is renewed meanwhile, and a pod
        that may be paused is not given up for a containerd that is only started anew. Raises
        ContainerdError for another reason, Interrupted."""
        while True:
            try:
                return self.pods.uid(_pod(one))
            except ContainerdError as error:
                if error.code != "UNAVAILABLE":
                    raise
                self.say(f"checkpoint {_name(one)}: {error}; asked again")
                if self.stopping.wait(min(1, self.settings.lease_seconds / 6)):
                    raise Interrupted("the agent ends; the next one looks at it again") from None

    def _checkpoint(self, one: Object, job: Job) -> None:
        status, pod = one["status"], _pod(one)
        if status["phase"] == "Submitting":
            self._submit(one)
            return
        again = status["phase"] == "Checkpointing"
        directory = status.get("dataPath", "") if again else ""
        directory = directory if self.settings.holds(directory) else ""
        try:
            directory = directory or self.settings.directory(one)
            there = os.path.isdir(directory) and bool(os.listdir(directory))
            if again:
                if there:  # a draft is renamed when it is whole: the word was lost, not the files
                    self._done(one, directory)
                    return
                if self._uid(one) != status.get("podUID"):
                    self._end(
                        one,
                        "Failed",
                        "PodGone",
                        f"pod {pod} has ended, or was replaced, while it was checkpointed and the "
                        "agent was not running. There are no files",
                    )
                    return
                self.pods.go_on(pod)
                if status.get("attempts", 0) >= ATTEMPTS:
                    self._end(
                        one,
                        "Failed",
                        "AgentKilled",
                        f"the agent was ended {ATTEMPTS} times during this checkpoint; see why in "
                        "its log (kubectl logs --previous). No checkpoint exists; the pod runs on",
                    )
                    return
            elif one["spec"].get("autoMigration") and (refused := self.migration.refused(one)):
                text = f"{refused}. Nothing was done to the pod"
                self._end(one, "Failed", "CannotMigrate", text)
                return
            elif there:
                self._end(
                    one,
                    "Failed",
                    "DirectoryExists",
                    f"{directory} is there already, and is not this Checkpoint's: move it away, "
                    "or use another name. Nothing was done to the pod",
                )
                return
            os.makedirs(os.path.dirname(directory), mode=0o700, exist_ok=True)
        except UnknownStore as error:
            self._end(one, "Failed", "UnknownStore", f"{error}. Nothing was done to the pod")
            return
        except _NO_MATTER as error:
            left = "Nothing was done to the pod"
            if again:
                left = (
                    "The agent was ended while it checkpointed the pod, which may still be paused: "
                    f"on node {self.settings.node}, gritctl resume -n k8s.io {pod}"
                )
            self._end(one, "Failed", "NotBegun", f"{error}. {left}")
            return

        asked_for = self._podspec(one)

        def begun(status: dict[str, Any]) -> None:
            status |= {"dataPath": directory, "attempts": status.get("attempts", 0) + 1}
            status |= asked_for

        text = f"the pod is written to {directory}"
        if not self._write(one, "Checkpointing", "Running", text, begun):
            return
        try:
            self.pods.save(pod, directory, job, job.interrupts)
        except Interrupted as error:
            # Deleted: the finalizer does the rest. Stopped: whoever comes next begins again.
            self.say(f"checkpoint {_name(one)}: {error}")
        except _NO_MATTER as error:
            if os.path.isdir(directory) and os.listdir(directory):
                # Whole, but not all runs on: the error says so.
                self._done(one, directory, f"{error}")
            else:
                self._end(one, "Failed", "CheckpointFailed", str(error))
        else:
            self._done(one, directory)

    def _podspec(self, one: Object) -> dict[str, Any]:
        """What its successor has to share with the pod, for the status; nothing if the API server
        does not know it. Raises Unanswered."""
        try:
            pod = self.migration.pod(one)
        except Unanswered:
            raise
        except ApiError as error:
            self.say(f"checkpoint {_name(one)}: the pod's specification is not known: {error}")
            return {}
        if pod is None:  # a static pod
            return {}
        parts = podspec.parts(pod["spec"])
        return {"podSpecHash": podspec.digest(parts), "podSpecParts": parts}

    def _done(self, one: Object, directory: str, but: str = "") -> None:
        size = self.pods.saved_bytes(directory)

        def finished(status: dict[str, Any]) -> None:
            status["progress"] = {**status.get("progress", {}), "phase": "done", "bytes": size}

        text = but or f"{size} bytes in {directory}"
        text += _odd_note(one)
        reason = "PodPaused" if but else "Complete"
        if one["spec"].get("autoMigration"):
            written = self._end(one, "Submitting", reason, text, finished, last=False)
        else:
            written = self._end(one, "Checkpointed", reason, text, finished)
        if not written and self._disowned(one):
            self.say(f"checkpoint {_name(one)} was taken from us: {directory} is removed")
            checkpoint_dir.remove(directory)
        elif written and one["spec"].get("autoMigration"):
            self._submit(one)

    def _submit(self, one: Object) -> None:
        """The files are whole; what is left is the API server's, and may be begun again."""
        current = self._still_ours(one)
        if current is None:
            return
        until = time.monotonic() + self.settings.lease_seconds

        def wait() -> bool:
            return self.stopping.wait(_LOOK_SECONDS) or time.monotonic() > until

        try:
            text = self.migration.submit(current, wait)
        except NotMigrated as error:
            where = current["status"].get("dataPath")
            text = f"{error}. The checkpoint is whole, in {where}"
            if not self.stopping.is_set():
                self._end(one, "Checkpointed", "NotMigrated", text)
        else:
            self._end(one, "Submitted", "Migrated", text)

    def _disowned(self, one: Object) -> bool:
        """Whether the files are nobody's: an agent that stops leaves them to its successor."""
        current = self.api.get(one["metadata"]["namespace"], one["metadata"]["name"])
        if current is None or current["metadata"]["uid"] != one["metadata"]["uid"]:
            return True
        status: dict[str, Any] = current.get("status") or {}
        return status.get("phase") == "Failed"

    def _end(
        self,
        one: Object,
        phase: str,
        reason: str,
        text: str,
        change: Callable[[dict[str, Any]], None] = lambda status: None,
        *,
        last: bool = True,
    ) -> bool:
        """Writes how it ended, or all but the `last` step of it, however long the API server takes;
        False if it is not ours any more, or the agent is to stop."""

        def ended(status: dict[str, Any]) -> None:
            change(status)
            if last:
                status["finishedAt"] = _now()

        pause = 0.2
        while True:
            try:
                return self._write(one, phase, reason, text, ended)
            except ApiError as error:
                self.say(f"checkpoint {_name(one)} is {phase}, which cannot be written: {error}")
                if self.stopping.wait(pause):
                    return False
                pause = min(2 * pause, 10)

    def _write(
        self,
        one: Object,
        phase: str,
        reason: str,
        text: str,
        change: Callable[[dict[str, Any]], None],
    ) -> bool:
        """False if the resource has gone, is finished or is not ours. Raises ApiError."""
        while True:
            current = self._still_ours(one)
            if current is None:
                return False
            status = current["status"]
            change(status)
            status["holder"] = self._holder()
            _set(current, phase, reason, text)
            try:
                return self.api.put_status(current) is not None
            except Conflict:
                continue

    def _still_ours(self, one: Object) -> Object | None:
        """As it is now, None if it has gone, is finished or is not ours. Raises ApiError."""
        meta = one["metadata"]
        current = self.api.get(meta["namespace"], meta["name"])
        if current is None or current["metadata"]["uid"] != meta["uid"]:
            return None
        status = current.get("status") or {}
        ours = status.get("holder", {}).get("name") == self.settings.node
        return current if ours and status.get("phase") not in FINISHED else None

    def _renew(self, one: Object, job: Job) -> None:
        one["status"] |= {"holder": self._holder()}
        if one["status"]["phase"] == "Checkpointing":
            one["status"]["progress"] = job.progress()
        self.api.put_status(one)
        job.written = time.monotonic()

    def _fail(self, one: Object, reason: str, text: str, holder: dict[str, Any]) -> None:
        """Fails what is nobody's, or a dead agent's. By the version looked at."""
        _set(one, "Failed", reason, text)
        one["status"] |= {"finishedAt": _now(), "holder": holder}
        self.api.put_status(one)
        self.say(f"checkpoint {_name(one)} failed: {text}")

    def _come_back(self, one: Object, job: Job) -> None:
        """Finishes or undoes what others have failed while this agent was away: nobody else can
        resume what it had paused."""
        status, directory = one["status"], one["status"].get("dataPath", "")
        if self.settings.holds(directory) and os.path.isdir(directory) and os.listdir(directory):
            text = f"{self.pods.saved_bytes(directory)} bytes in {directory}, though its agent was "
            _set(one, "Checkpointed", "Complete", text + "away before it could say so")
        else:
            told = "nothing was done to the pod"
            if directory:  # written before the pod is paused
                told = self._undo(one, directory)
            text = f"node {self.settings.node} was lost during the checkpoint and is back: {told}"
            _set(one, "Failed", "NodeCameBack", text)
        status["finishedAt"] = _now()
        self.api.put_status(one)
        self.say(f"checkpoint {_name(one)} is {status['phase']}: {text}")

    def _undo(self, one: Object, directory: str) -> str:
        """Resumes the pod and removes drafts; says what became of them."""
        try:
            with self._lock_of(one):
                if self._uid(one) != one["status"].get("podUID"):
                    told = "the pod has ended meanwhile"
                else:
                    self.pods.go_on(_pod(one))
                    told = "the pod runs on"
        except ContainerdError as error:
            told = f"the pod may still be paused ({error}): gritctl resume -n k8s.io {_pod(one)}"
        if self.settings.holds(directory):
            _remove(directory)
        return f"{told}. There are no files; make another Checkpoint"

    def _clear(self, one: Object, job: Job) -> None:
        """Removes the files of a deleted Checkpoint, then lets it go."""
        meta, status = one["metadata"], one.get("status") or {}
        node = status.get("nodeName", "")
        ours = node == self.settings.node
        if ours and (status.get("phase") == "Checkpointing" or _is_lost(one)):
            with self._lock_of(one):
                if self._uid(one) == status.get("podUID"):
                    self.pods.go_on(_pod(one))
        reader = self.migration.reader_of(one)
        if reader:
            self._say_why_not(
                one, f"the Restore {reader} reads the files; they go when it has ended"
            )
            return
        directory = status.get("dataPath", "")
        if not (ours or one["spec"].get("volumeClaim")):
            if directory:
                self.say(f"checkpoint {_name(one)}: {directory} was left on node {node}")
        elif self.settings.holds(directory):
            try:
                _remove(directory)
            except CheckpointDirError as error:
                self._say_why_not(one, str(error))
                raise
            self.say(f"checkpoint {_name(one)} was deleted: {directory} is removed")
        meta["finalizers"] = [name for name in meta["finalizers"] if name != FINALIZER]
        self.api.put(one)

    def _say_why_not(self, one: Object, text: str) -> None:
        conditions = one.get("status", {}).get("conditions", [])
        if all(each["message"] != text for each in conditions):
            _set(one, one["status"]["phase"], "NotRemoved", text)
            self.api.put_status(one)

    def _lock_of(self, one: Object) -> threading.Lock:
        return self._busy.setdefault(_pod(one), threading.Lock())

    def _expire(self, one: Object) -> None:
        after = one["spec"].get("ttlSecondsAfterFinished")
        if after is None:
            note = _note(one)
            after = int(note) if note.isdecimal() else None
        ended = one["status"].get("finishedAt")
        if after is None or not ended:
            return
        now = datetime.datetime.now(datetime.UTC)
        if (now - datetime.datetime.fromisoformat(ended)).total_seconds() >= after:
            self.say(f"checkpoint {_name(one)} has finished {after} s ago: deleted")
            self.api.delete(one)

    def _holder(self) -> dict[str, Any]:
        return {"name": self.settings.node, "until": _now(self.settings.lease_seconds)}


def _is_lost(one: Object) -> bool:
    """Whether others have taken its agent for dead."""
    found = (one.get("status") or {}).get("conditions", [])
    return any(each["type"] == CONDITION and each["reason"] == LOST for each in found)


def _note(one: Object) -> str:
    found: str = (one["metadata"].get("annotations") or {}).get(TTL, "")
    return found


def _odd_note(one: Object) -> str:
    """What is to be said of an annotation that the API server cannot check; "" for nothing."""
    note = _note(one)
    if not note or note.isdecimal():
        return ""
    return f". It is kept until it is deleted: {TTL} is {note!r}, which is no number of seconds"


def _remove(directory: str) -> None:
    """Removes a checkpoint and what killed agents have left of it. Raises CheckpointDirError."""
    if os.path.isdir(directory):
        checkpoint_dir.remove(directory)
    checkpoint_dir.remove_abandoned(*os.path.split(directory))


def _set(one: Object, phase: str, reason: str, text: str) -> None:
    set_phase(one, phase, CONDITION, reason, text)


def _pod(one: Object) -> str:
    return f"{one['metadata']['namespace']}/{one['spec']['podName']}"
