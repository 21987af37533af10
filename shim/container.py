"""A container as the intercepted calls know it: where its bundle is, which options it runs
under, how to ask the inner shim about it, and what has been done to it that must be undone.

Policy lives in checkpoint.py and restore.py; this file only holds state and answers questions.
"""

from __future__ import annotations

import os
import threading

from shim import cgroup, journal, messages, runcstate
from shim.cuda import discovery
from shim.cuda.suspension import Process
from shim.ttrpc import DEADLINE_EXCEEDED, StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.checkpoint_dir import Draft
    from shim.config import GritOptions
    from shim.confined import Identity
    from shim.criu_bridge.transport import Cancel
    from shim.cuda.suspension import Suspension
    from shim.devices import Gpu
    from shim.manifest import Manifest
    from shim.protowire import Message
    from shim.ttrpc import Client


class Restore:
    """What Start needs to know: the image directory, the `source` it was decrypted from (else it is
    that itself) and, where that is confined, the `identity` that it must still have then; its
    manifest (None for images that another tool wrote), the diff of the root file system and the
    saved log that nobody else puts back, the GPUs the container is given, the driver's map from the
    old ones to these, "" for the same ones, and the memory limits to put back: bytes as raised ->
    before."""

    __slots__ = (
        "device_map",
        "given",
        "identity",
        "images",
        "log",
        "manifest",
        "raised_limits",
        "rootfs_diff",
        "source",
    )

    def __init__(
        self,
        images: str,
        manifest: Manifest | None,
        rootfs_diff: str | None,
        log: str | None = None,
    ) -> None:
        self.device_map = ""
        self.given: list[Gpu] = []
        self.identity: Identity | None = None
        self.images = self.source = images
        self.log = log
        self.manifest = manifest
        self.raised_limits: dict[int, int] = {}
        self.rootfs_diff = rootfs_diff

    @property
    def processes(self) -> list[Process]:
        """The CUDA processes the images hold."""
        if self.manifest is None:
            return []
        return [Process.from_dict(plain) for plain in self.manifest.cuda_processes]

    @property
    def in_lane(self) -> bool:
        """Whether memory of theirs is in the lane's files, to be filled in before they run."""
        return any(process.lane for process in self.processes)

    @property
    def engine(self) -> str:
        return self.manifest.engine if self.manifest else "none"

    @property
    def memory_bytes(self) -> int:
        """How much memory the images fill, device memory included."""
        files = self.manifest.files.items() if self.manifest else ()
        pages = sum(file.size for name, file in files if name.startswith("pages-"))
        # Not their files': those may be compressed.
        return pages + sum(shard.size for process in self.processes for shard in process.lane)


def _alone() -> None:
    """No other container is waited for."""


class Container:
    """One task of the group. `lock` is held by whichever of Pause, Checkpoint, Resume and Start
    is at work on it; State, Pids and Kill never take it."""

    __slots__ = (
        "_dump",
        "_dump_guard",
        "_freezer",
        "_inner",
        "ahead",
        "bundle",
        "choice",
        "config",
        "criu_version",
        "given",
        "held",
        "home",
        "id",
        "journal",
        "kept",
        "lock",
        "meant",
        "meet",
        "namespace",
        "orphanable",
        "paused_by",
        "paused_in",
        "phases",
        "plain",
        "raised_limits",
        "restore",
        "runc",
        "service",
        "sizes",
        "suspension",
        "terminal",
        "together",
        "trace",
        "watch",
    )

    def __init__(
        self,
        inner: Client,
        service: str,
        namespace: str,
        request: messages.CreateTaskRequest,
        runc: messages.RuncOptions,
        config: GritOptions,
    ) -> None:
        self._inner = inner
        self._freezer = ""
        self.service = service
        self.namespace = namespace
        self.id = request.id
        self.bundle = request.bundle
        self.terminal = request.terminal
        self.runc = runc
        self.config = config
        self.lock = threading.Lock()
        self.meet: Callable[[], None] = _alone
        """Called between suspension and freeze: waits for the other containers of the pod, where
        they are paused together."""
        self.together = False
        """Whether that is so: the pod is annotated `grit.dev/together`."""
        self.suspension: Suspension | None = None
        """The GPU as given back to the node; None while the container has it, or has none."""
        self.criu_version = ""
        """Of the CRIU that is to dump it, as it said before."""
        self.paused_in: dict[str, float] = {}
        """Seconds that phases of the last pause took, for the manifest."""
        self.paused_by: int | None = None
        """The connection whose Pause has not met its Resume."""
        self.orphanable = False
        """Whether that Pause belongs to a Checkpoint, so that its connection's end undoes it."""
        self.raised_limits: dict[str, tuple[int, int]] = {}
        """Memory limits to put back when the GPU is: file -> bytes before, and as raised."""
        self.kept: Draft | None = None
        """Of a failed checkpoint: its files are all there is of some device memory."""
        self.ahead: Draft | None = None
        """Begun at a Pause, for the Checkpoint that its client has announced."""
        self.held: dict[str, int] = {}
        """Open files, by name, that hold device memory the processes lack: shim/lane.py."""
        self.plain: Draft | None = None
        """What it is being restored from, decrypted."""
        self.given: list[Gpu] = []
        """The GPUs a restored container was given; in its /dev are those of its first life, too."""
        self.home = ""
        """The group's run directory."""
        self.journal: dict[str, object] = {}
        """What is noted of the operation under way: shim/journal.py."""
        self.watch: threading.Timer | None = None
        """Runs while it is paused and its client silent: shim/watchdog.py."""
        self.meant = ""
        """The Restore that the node's agent means for it, by uid: it is told how that ends."""
        self.trace: dict[str, str] = {}
        """The trace that the operation under way belongs to, as its caller told it."""
        self.phases: dict[str, float] = {}
        """Seconds that each phase of the operation under way, or of the last one, took."""
        self.sizes: dict[str, int] = {}
        """Bytes it moved: "device" to the host, "image" to the disk."""
        self.choice = ""
        """Why the lane's files were compressed as they were, or not; "" where none were to be."""
        self._dump: Cancel | None = None
        self._dump_guard = threading.Lock()
        self.restore: Restore | None = None
        """What Start has to bring back; None for a container that starts as any other."""

    def ask(
        self, method: str, request: Message | None = None, timeout: float | None = None
    ) -> bytes:
        """One call to the inner shim about this task. Raises ttrpc.StatusError with the inner's
        words, or DEADLINE_EXCEEDED after `timeout` seconds, ttrpc.ConnectionClosed if it has
        died."""
        message = request if request is not None else messages.TaskRequest(id=self.id)
        return self._inner.call(
            self.service, method, message.encode(), timeout=timeout, metadata=self.trace
        )

    def status(self) -> int:
        """The task's status as the inner shim sees it (messages.RUNNING, PAUSED, ...)."""
        return messages.StateResponse.decode(
            self.ask("State", messages.ExecRequest(id=self.id))
        ).status

    def kill(self, seconds: float) -> bool:
        """Kills all its processes; whether the inner shim has seen the end of the first within
        that time. Until it has, a client that deletes the task is refused."""
        self.ask("Kill", messages.KillRequest(id=self.id, signal=9, all=True))
        try:
            self.ask("Wait", messages.ExecRequest(id=self.id), timeout=seconds)
        except StatusError as error:
            if error.code != DEADLINE_EXCEEDED:
                raise
            return False
        return True

    def begin_dump(self) -> Cancel:
        """What a Resume stops the dump with that is now beginning; `end_dump` is to follow."""
        from shim.criu_bridge.transport import Cancel

        with self._dump_guard:
            self._dump = Cancel()
            return self._dump

    def end_dump(self) -> None:
        with self._dump_guard:
            if self._dump is not None:
                self._dump.close()
            self._dump = None

    def give_up_dump(self) -> None:
        """Has CRIU undo a dump that is under way; its Checkpoint call fails then. Nothing, if
        there is none, or all of it is written."""
        with self._dump_guard:
            if self._dump is not None:
                self._dump.cancel()

    @property
    def plain_in(self) -> str:
        """Where the images of its encrypted checkpoints lie in the clear, while they are written
        and while they are restored."""
        return self.config.scratch_dir or self.bundle

    def runc_state(self) -> runcstate.RunState:
        """runc's record of the container. Raises runcstate.StateError before its start."""
        return runcstate.load(self.runc.root or runcstate.DEFAULT_ROOT, self.namespace, self.id)

    def has_ended(self) -> bool:
        """Whether its first process has ended."""
        state = self.runc_state()
        return not discovery.alive(state.init_process_pid, state.init_process_start)

    def ends_within(self, seconds: float) -> bool:
        """Whether its first process has ended, or does within that time."""
        import select

        try:
            process = os.pidfd_open(self.runc_state().init_process_pid)
        except (ProcessLookupError, runcstate.StateError):
            return True
        try:
            return bool(select.select([process], [], [], seconds)[0])
        finally:
            os.close(process)

    def freezer(self) -> str:
        """The directory of the control group that Pause freezes; "" if runc recorded none."""
        if not self._freezer:
            self._freezer = self.runc_state().freezer_path or ""
        return self._freezer

    def pids(self) -> list[int]:
        """Every process of the container, execs and nested pid namespaces included."""
        return cgroup.processes(self.freezer())

    def memory_group(self) -> str:
        """The directory of the control group that the container's memory is charged to; "" if
        runc recorded none."""
        paths = self.runc_state().cgroup_paths
        return paths.get("memory") or paths.get("", "")

    def close_held(self) -> None:
        """The files in `held` are needed no more."""
        for fd in self.held.values():
            os.close(fd)
        self.held.clear()

    def forget_pause(self) -> None:
        """The Pause has met its end: a Resume, or the end of all processes."""
        self.suspension = self.paused_by = None
        self.orphanable = False
        self.close_held()
        journal.close(self)
