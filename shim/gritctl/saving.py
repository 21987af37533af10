"""The life of `gritctl checkpoint`, top to bottom.

    suspend   Pause: the shim takes the GPU from all processes and freezes them
    dump      Checkpoint: CRIU writes the images, beside which everything else goes
    rootfs    what the container changed in its root file system, by containerd's diff service
    files     the log, and containerd's own description of the container
    resume    Resume: thawed, the GPU given back. Everything above fits one instant
    publish   checksums, sync, rename: now there is a checkpoint
    end       with --exit, instead of resume, and only once the checkpoint is safe; for a migration
              once the container runs on the other node

Everything goes into a draft; what fails or is interrupted before it is published leaves nothing
behind and the workload running. Calls to containerd are never cut short: a Pause or a Checkpoint
that nobody waits for would leave the container frozen.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import shutil
import time
from contextlib import ExitStack

from shim import announced, checkpoint_dir, config, messages, signing
from shim.checkpoint_dir import CheckpointDirError, ForeignCheckpoint
from shim.gritctl import containerd as api
from shim.gritctl import messages as m
from shim.gritctl import targets
from shim.gritctl.containerd import ContainerdError
from shim.gritctl.interrupts import Interrupted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from shim.gritctl.containerd import Call, Containerd
    from shim.gritctl.interrupts import Interrupts
    from shim.gritctl.progress import Display, Phase
    from shim.gritctl.targets import Target

    Answer = Call[m.Nothing]

    class Elsewhere(Protocol):
        """Where the containers are to go on. What fails raises SavingError."""

        def follow(self, directory: str) -> None:
            """All that is saved is going to be written below this directory, which is renamed
            once it is whole."""

        def check(self) -> None:
            """Asked again and again, whether it still makes sense to go on."""

        def deliver(self, idle: Callable[[], None]) -> None:
            """The checkpoint is whole. Returns once the containers run elsewhere, and only then;
            calls `idle`, which may raise, while it waits."""


_LOOK_SECONDS = 0.1
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_LEASE_HOURS = 24
"""After which containerd clears away what a killed gritctl has left in its content store."""


class SavingError(Exception):
    """No checkpoint was made; the text says why, and what state the workload is in."""


class _Stopped(Exception):
    """A signal has come."""


class Saving:
    """One `gritctl checkpoint`: `targets` are a container, or the containers of a pod. With `end`
    they are killed once the checkpoint is safe, else they run on. With `elsewhere` they are killed
    once they run there."""

    def __init__(
        self,
        containerd: Containerd,
        found: list[Target],
        directory: str,
        display: Display,
        interrupts: Interrupts,
        *,
        pod: bool,
        end: bool,
        elsewhere: Elsewhere | None = None,
    ) -> None:
        self.containerd = containerd
        self.targets = found
        self.directory = os.path.abspath(directory)
        self.display = display
        self.interrupts = interrupts
        self.pod = pod
        self.end = end or elsewhere is not None
        self.elsewhere = elsewhere
        self._paused: list[Target] = []  # by us: their Resume is ours
        self._pausing: list[Answer] = []
        self._dumping: Answer | None = None

    def run(self) -> None:
        """Raises SavingError, CheckpointDirError or Interrupted: then there is no checkpoint, and
        the workload runs on, or the text says what does not."""
        for target in self.targets:
            if targets.under_grit(target, self.containerd.namespace) is False:
                raise SavingError(
                    f"container {target} does not run under grit, but under "
                    f"{target.container.runtime.name if target.container.runtime else 'nothing'}: "
                    "start it with the runtime io.containerd.grit.v1. Nothing was done to it"
                )
        sign = signing.signer(config.load()[1].sign_key)
        draft = checkpoint_dir.Draft.begin(self.directory)
        lease = ""
        try:
            try:
                lease = self._begin_lease()
                if self.elsewhere:
                    self.elsewhere.follow(draft.path)
                self._suspend(draft)
                for target in self.targets:
                    self._dump(target, self._place(draft, target), lease)
                for target in self.targets:
                    self._save_rootfs(target, self._place(draft, target), lease)
                    self._save_files(target, self._place(draft, target))
                self._go_on_unless_stopped()
                stuck = "" if self.end else self._resume()
                with self.display.phase(self._all(), "publish"):
                    draft.publish_whole(sign)
                if self.elsewhere:
                    self.elsewhere.deliver(self._go_on_unless_stopped)
            except _Stopped:
                self.display.say("interrupted: undoing; a GPU copy under way has to end first")
                raise Interrupted(f"interrupted. Undone: {self._undo()}") from None
            except (ContainerdError, CheckpointDirError, SavingError, OSError) as error:
                raise SavingError(f"{_reason(error)}. Undone: {self._undo()}") from error
            if stuck:
                raise SavingError(f"the checkpoint {self.directory} is whole, but {stuck}")
            if self.end:
                self._end()
        finally:
            try:
                draft.discard()
            except CheckpointDirError as error:  # the images are root's, and we are not
                self.display.say(str(error))
            if lease:
                self._end_lease(lease)

    # --- the phases -----------------------------------------------------------------------

    def _suspend(self, draft: checkpoint_dir.Draft) -> None:
        """All containers of a pod at the same time: what they say to each other must fit."""
        self._paused = [one for one in self.targets if one.task.status == m.RUNNING]
        before = self._anonymous(self._paused)
        for target in self.targets:
            os.makedirs(self._place(draft, target), mode=0o700, exist_ok=True)
        with ExitStack() as announcements, self.display.phase(self._all(), "suspend") as phase:
            for one in self._paused:
                images = os.path.join(self._place(draft, one), checkpoint_dir.IMAGES)
                announcements.enter_context(
                    announced.announcing(self.containerd.namespace, one.id, images)
                )
            for one in self._paused:
                self._pausing.append(self._ask("Pause", one))
            self._wait(self._pausing, phase, lambda: max(0, self._anonymous(self._paused) - before))

    def _dump(self, target: Target, place: str, lease: str) -> None:
        images = os.path.join(place, checkpoint_dir.IMAGES)
        options = messages.CheckpointOptions(image_path=images)
        request = m.CheckpointTask(
            container_id=target.id,
            options=m.Any(type_url=messages.CHECKPOINT_OPTIONS, value=options.encode()),
        )
        total = self._anonymous([target]) or None
        with self.display.phase(str(target), "dump", total) as phase:
            self._dumping = self.containerd.begin(
                api.TASKS, "Checkpoint", request, m.Nothing, lease=lease
            )
            try:
                self._wait([self._dumping], phase, lambda: _bytes_below(place))
            except ContainerdError as error:
                # containerd 1.7, after a dump that went well, stores an empty archive as content,
                # and stumbles over the one of an earlier dump (services/tasks/local.go).
                told = str(error)
                stumbled = told.startswith("content sha256:") and told.endswith("already exists")
                if not stumbled or not os.path.isdir(images):
                    raise
        try:
            checkpoint_dir.load(images)
        except ForeignCheckpoint:
            raise SavingError(
                f"container {target} does not run under grit: its images have no manifest"
            ) from None
        except CheckpointDirError:
            if os.access(images, os.R_OK | os.X_OK):
                raise
            # They are root's and we are not; the shim has checked them.

    def _save_rootfs(self, target: Target, place: str, lease: str) -> None:
        container = target.container
        if not container.snapshot_key:
            return
        key = f"gritctl-{lease}-{target.id}"
        upper = m.SnapshotRef(snapshotter=container.snapshotter, key=container.snapshot_key)
        lower = m.SnapshotRef(
            snapshotter=container.snapshotter, key=key, parent=parent_of(self.containerd, container)
        )
        with self.display.phase(str(target), "rootfs") as phase:
            left = self.containerd.call(api.SNAPSHOTS, "View", lower, m.Mounts, lease=lease)
            try:
                right = self.containerd.call(api.SNAPSHOTS, "Mounts", upper, m.Mounts)
                request = m.DiffRequest(
                    left=left.mounts, right=right.mounts, media_type=_LAYER, ref=key
                )
                call = self.containerd.begin(api.DIFF, "Diff", request, m.DiffReply, lease=lease)
                self._wait([call], phase, lambda: self._ingested(key))
                diff = call.result().diff or m.Descriptor()
            finally:
                self.containerd.do(api.SNAPSHOTS, "Remove", lower)
            done = 0
            with open(os.path.join(place, checkpoint_dir.ROOTFS_DIFF), "xb") as file:
                for piece in self.containerd.read(diff.digest):
                    file.write(piece)
                    done += len(piece)
                    phase.at(done)
                    self._go_on_unless_stopped()
        if done != diff.size:
            raise SavingError(f"the diff of container {target} came with {done} of {diff.size} B")

    def _save_files(self, target: Target, place: str) -> None:
        """config.dump with the keys that checkpointctl knows and what `gritctl restore` needs
        under one of our own; spec.dump; and the log, if there is one that can be read."""
        documents = {
            checkpoint_dir.CONFIG_DUMP: self._config(target),
            checkpoint_dir.SPEC_DUMP: target.spec,
        }
        for name, document in documents.items():
            with open(os.path.join(place, name), "x", encoding="utf-8") as file:
                json.dump(document, file, indent=2)
        log = targets.log_of(target)
        if not log:
            return
        try:
            shutil.copyfile(log, os.path.join(place, checkpoint_dir.CONTAINER_LOG))
        except OSError as error:
            self.display.say(f"the log {log} was left out: {error.strerror}")

    def _resume(self) -> str:
        """Says which containers do not run on and why, "" if all do: what was saved is whole then
        all the same, and may be all that is left of them."""
        with self.display.phase(self._all(), "resume"):
            failed = self._resumed()
        self._paused, self._pausing = [], []
        return failed

    def _end(self) -> None:
        with self.display.phase(self._all(), "end"):
            for target in self.targets:
                try:
                    reference = m.TaskRef(container_id=target.id)
                    ended = self.containerd.begin(api.TASKS, "Wait", reference, m.Waited)
                    kill = m.KillTask(container_id=target.id, signal=9, all=True)
                    self.containerd.do(api.TASKS, "Kill", kill)
                    ended.result()
                except ContainerdError as error:
                    if self.elsewhere:
                        raise SavingError(
                            f"container {target} runs on the other node, but could not be ended "
                            f"here, where it is paused: {error}. Kill it, do not resume it"
                        ) from error
                    raise SavingError(
                        f"the checkpoint {self.directory} is whole, but container {target} could "
                        f"not be ended: {error}. It is paused: gritctl resume {target.id}"
                    ) from error

    # --- undoing --------------------------------------------------------------------------

    def _undo(self) -> str:
        """Has everything that we paused run again; says how that went.

        A Pause has to come back first: it might reach the shim after our Resume. A dump has not:
        its Resume makes the shim give it up."""
        for target, pause in zip(list(self._paused), self._pausing, strict=False):
            try:
                pause.result()
            except ContainerdError:  # the shim has taken it back itself
                if self._status(target) == m.RUNNING:
                    self._paused.remove(target)
        failed = self._resumed()
        if self._dumping:
            self._dumping.wait()
        done = "" if self.elsewhere else "no checkpoint was made, and "
        if failed:
            return done + failed
        if all(one.task.status == m.PAUSED for one in self.targets):
            return f"{done}{self._all()} stays paused, as it was"
        return f"{done}{self._all()} runs on"

    def _resumed(self) -> str:
        """Resumes all that we paused, at the same time; says what went wrong, "" for nothing."""
        failed = []
        for target, call in [(one, self._ask("Resume", one)) for one in self._paused]:
            try:
                call.result()
            except ContainerdError as error:
                failed.append(
                    f"container {target} could not be resumed: {_reason(error)}. Try again: "
                    f"gritctl resume {target.id}"
                )
        return "; ".join(failed)

    def _status(self, target: Target) -> int:
        try:
            task = self.containerd.task(target.id)
        except ContainerdError:
            return 0
        return task.status if task else 0

    # --- asking containerd ----------------------------------------------------------------

    def _ask(self, method: str, target: Target) -> Answer:
        request = m.TaskRef(container_id=target.id)
        return self.containerd.begin(api.TASKS, method, request, m.Nothing)

    def _wait(
        self, calls: Sequence[Call[Any]], phase: Phase, measure: Callable[[], int] | None
    ) -> None:
        """Until all have come back, telling how far they are. Raises what the first to fail did,
        but not before the others are back, too; _Stopped as soon as a signal has come."""
        for call in calls:
            while not call.wait(_LOOK_SECONDS):
                self._go_on_unless_stopped()
                if measure:
                    phase.at(measure())
        self._go_on_unless_stopped()
        if measure and (done := measure()):
            phase.at(done)
        for call in calls:
            call.result()

    def _go_on_unless_stopped(self) -> None:
        if self.interrupts.came:
            raise _Stopped
        if self.elsewhere:
            self.elsewhere.check()

    def _anonymous(self, containers: list[Target]) -> int:
        """Bytes of memory that CRIU will have to write, 0 where we may not know."""
        total = 0
        for target in containers:
            try:
                total += sum(map(memory_of, self.containerd.pids(target.id)))
            except ContainerdError:
                return 0
        return total

    def _ingested(self, reference: str) -> int:
        try:
            request = m.IngestRef(ref=reference)
            status = self.containerd.call(api.CONTENT, "Status", request, m.OneIngest).status
        except ContainerdError:
            return 0  # not begun, or done
        return status.offset if status else 0

    def _config(self, target: Target) -> dict[str, object]:
        container = target.container
        runtime = container.runtime or m.Runtime()
        options = runtime.options or m.Any()
        return {
            "id": container.id,
            "name": target.name or container.id,
            "rootfsImageName": container.image,
            "runtime": runtime.name,
            "createdTime": _time(container.created_at),
            "checkpointedTime": _time(None),
            "grit": {
                "namespace": self.containerd.namespace,
                "labels": container.labels,
                "snapshotter": container.snapshotter,
                "parent": parent_of(self.containerd, container),
                "runtime_options": {
                    "type_url": options.type_url,
                    "value": base64.b64encode(options.value).decode(),
                },
                "terminal": target.task.terminal,
            },
        }

    def _begin_lease(self) -> str:
        expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=_LEASE_HOURS)
        request = m.NewLease(
            id=f"gritctl-{os.urandom(6).hex()}",
            labels={"containerd.io/gc.expire": expires.strftime("%Y-%m-%dT%H:%M:%SZ")},
        )
        self.containerd.do(api.LEASES, "Create", request)
        return request.id

    def _end_lease(self, lease: str) -> None:
        try:
            self.containerd.do(api.LEASES, "Delete", m.LeaseRef(id=lease))
        except ContainerdError as error:
            self.display.say(f"the lease {lease} was left to end by itself: {error}")

    def _place(self, draft: checkpoint_dir.Draft, target: Target) -> str:
        return os.path.join(draft.path, target.name) if self.pod else draft.path

    def _all(self) -> str:
        return str(self.targets[0]) if len(self.targets) == 1 else "pod"


def parent_of(containerd: Containerd, container: m.Container) -> str:
    """The snapshot that the container's own was made from: its image's. "" without one. Raises
    ContainerdError."""
    if not container.snapshot_key:
        return ""
    reference = m.SnapshotRef(snapshotter=container.snapshotter, key=container.snapshot_key)
    info = containerd.call(api.SNAPSHOTS, "Stat", reference, m.OneSnapshot).info
    return info.parent if info else ""


def memory_of(pid: int) -> int:
    """proc_pid_status(5): anonymous and shared memory of a process, in bytes. Of the shared, each
    process counts all: an estimate."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            found = dict(line.split(":", 1) for line in file if ":" in line)
        return sum(int(found.get(key, "0").split()[0]) for key in ("RssAnon", "RssShmem")) << 10
    except OSError:
        return 0


def _bytes_below(directory: str) -> int:
    total = 0
    for base, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue  # renamed meanwhile
    return total


def _time(moment: m.Timestamp | None) -> str:
    """RFC 3339; None is now."""
    seconds = moment.seconds if moment else time.time()
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    return str(error).rstrip(".")
