"""The life of a container that is restored: what Create prepares and Start finishes.

    Create   find the image directory, waiting for its download if need be, verify it, tell CRIU's
             options to the inner shim's `runc restore` the only way it listens (a configuration
             file named by an annotation), decrypt the images, and put the root file system's diff
             and the log in place
    Start    the inner shim restores the processes, whose pod gets its host name back; then each
             CUDA process gets its GPU back and is asked whether it runs; what was decrypted goes

CRIU reports success even where the CUDA side failed, so nothing is believed here that the driver
has not said itself. A restore that fails leaves nothing running and its log behind.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import nullcontext

from shim import (
    bundle,
    checkpoint_dir,
    cri,
    devices,
    failpoint,
    fit,
    gpu,
    headroom,
    injected,
    journal,
    lane,
    log,
    messages,
    places,
    sealed,
    uts,
)
from shim.checkpoint_dir import CheckpointDirError, Draft
from shim.container import Restore
from shim.criu_bridge import config as criu_config
from shim.criu_bridge import freezer, request, restoring
from shim.criu_bridge.errors import explain, first_error, read_log
from shim.cuda import states
from shim.cuda.errors import CudaError
from shim.ttrpc import StatusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from shim.config import GritOptions
    from shim.confined import Identity
    from shim.container import Container
    from shim.manifest import Manifest
    from shim.pod import Pod

ANNOTATION = bundle.RESTORE_ANNOTATION
GRIT_RESTORE = "grit.dev/restore-name"
"""GRIT's manager puts it on a pod whose checkpoint its agent is to bring to the node."""

_NO_ERROR = "CRIU's log shows no error"
_RUNC_LOST_CRIU = " unixpacket "
"""In what runc says of a CRIU that ended without an answer (1.3 libcontainer/criu_linux.go)."""
_THAW_SECONDS = 10.0
_KILL_SECONDS = 10.0
_LOOK_SECONDS = 0.2
"""How often the word that a download is whole is looked for; GRIT's own containerd looks every
second. The directory may be one of another machine, whose changes nobody is told of."""


class RestoreError(Exception):
    """A restore that was refused or failed; nothing of it is running."""


def prepare(container: Container, create: messages.CreateTaskRequest) -> Restore | None:
    """Decides whether the container is to be restored, and from where; None if it is not.

    The client's own `checkpoint` comes first (`ctr c restore`, `nerdctl start --checkpoint`,
    CRI); else the annotation `grit.dev/checkpoint`. Changes `create` and the bundle's
    config.json to match. Raises CheckpointDirError, RestoreError, fit.Mismatch, DeviceError,
    injected.NotGiven or headroom.NoRoom with nothing created but, it may be, `container.plain`.
    """
    spec = bundle.read_spec(container.bundle)
    images, diff, saved_log, identity = create.checkpoint, None, None, None
    if not images:
        images = _annotated(bundle.annotations_of(spec), container)
        if not images:
            return None
        identity = _identity(images, container.config)
        if container.config.checkpoint_roots and identity is None:
            raise RestoreError(f"container {container.id}: the checkpoint {images} has just gone")
        diff, saved_log = checkpoint_dir.rootfs_diff(images), checkpoint_dir.container_log(images)
    failpoint.reach("verify")
    manifest = _verified(images, container.config, beside=not create.checkpoint)
    fit.require(container, spec, images, manifest)
    found = Restore(images, manifest, diff, saved_log)
    found.identity = identity
    injections: list[tuple[str, str | None]] = []
    try:
        with_cuda = bool(found.processes)
    except (KeyError, TypeError, ValueError) as error:
        raise RestoreError(f"{images}: cuda_processes in its manifest: {error!r}") from error
    if with_cuda:
        _fit_gpus(container, found, spec)
        headroom.make_room_for_restore(container, found, spec)
    if manifest is not None:
        injections = injected.give_again(container, manifest, spec, found.given)
    _write_criu_config(container, spec, found, injections)
    if manifest is not None and manifest.encryption:
        found.images = _decrypted(container, images, manifest)
    create.checkpoint = found.images
    failpoint.reach("create")
    return found


def fill(container: Container, filled_volumes: set[str]) -> None:
    """Puts back the pod's volumes, unless another of its containers has (`filled_volumes`), the
    root file system's diff and the log's lines, after the inner shim has mounted the one and CRI
    has opened the other, and before any process writes there; makes the mount points that CRIU
    will need. Diff and log only for restores by annotation: other clients do it themselves. Raises
    rootfs_diff.DiffError."""
    from shim import rootfs_diff, volumes

    found = container.restore
    assert found is not None
    failpoint.reach("fill")
    _require_same(container, found)
    limits = container.config.unpack_bytes, container.config.unpack_files
    spec = bundle.read_spec(container.bundle)
    left_out = volumes.put_back(spec, found.images, filled_volumes, limits)
    if found.rootfs_diff:
        rootfs = os.path.join(container.bundle, "rootfs")
        left_out += rootfs_diff.apply(
            found.rootfs_diff, rootfs, limits=limits, python=places.python()
        )
    if left_out:
        log.warning(
            "not all of the checkpoint's files were put back",
            id=container.id,
            left_out="; ".join(left_out[:5]),
            count=len(left_out),
        )
    if found.manifest is not None:
        injected.make_mount_points(container, found.manifest)
    if found.log:
        _fill_log(container, found.log)


def _fill_log(container: Container, saved: str) -> None:
    """Appends the saved log to the one that CRI has just opened. A log is no reason to fail."""
    target = cri.log_file(
        container.bundle, bundle.annotations_of(bundle.read_spec(container.bundle))
    )
    if target is None:
        return
    try:
        with open(saved, "rb") as source:
            fd = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "wb") as log_now:
                if os.fstat(fd).st_size == 0:
                    shutil.copyfileobj(source, log_now)
    except OSError as error:
        log.warning(
            "the log saved with the checkpoint was not put back", id=container.id, error=error
        )


def start(container: Container, pod: Pod) -> bytes:
    """Restores the processes and gives them their GPU back; the inner shim's answer to Start.
    Connections to other containers of the pod outlast it, where they are kept.

    Raises RestoreError, with the container killed, if any CUDA process does not run; the inner
    shim's StatusError if CRIU failed. Both with CRIU's log kept and its reason added.
    """
    found = container.restore
    assert found is not None
    _require_same(container, found)
    if found.images != found.source and container.plain is None:
        raise RestoreError(
            f"container {container.id}: what was decrypted of {found.source} was removed when its "
            "first Start failed: delete the task and create it again"
        )
    began = time.monotonic()
    spec = bundle.read_spec(container.bundle)
    names = uts.wanted(spec)
    failpoint.reach("restore")
    journal.note(container, journal.RESTORING, images=found.source)
    inner = messages.ConnectResponse.decode(container.ask("Connect")).shim_pid
    watch = restoring.Watch(inner, container.bundle, container.config.restore_timeout)
    try:
        with _connections_of(container, found, pod), watch:
            reply = container.ask("Start", messages.ExecRequest(id=container.id))
    except StatusError as error:
        lost = restoring.DIED if _RUNC_LOST_CRIU in error.message else ""
        told = ": ".join(filter(None, (watch.ended or lost, error.message)))
        told = _explained(container, told)
        try:
            restoring.end_left(inner, str((spec.get("linux") or {}).get("cgroupsPath") or ""))
            restoring.clear(bundle.work_directory(container.bundle))
        except OSError as problem:
            told += f"; what CRIU has left is still there: {problem}"
        raise StatusError(error.code, told) from error
    criu = round(time.monotonic() - began, 3)
    container.phases["criu_restore"] = criu
    try:
        uts.give(names, spec, messages.StartResponse.decode(reply).pid)
        if found.in_lane:
            lane.fill_restored(container, found)
        _thaw(container)
        if found.in_lane:
            lane.let_run(container, found.images)
        failpoint.reach("restore-gpu")
        journal.note(container, journal.RESTORING_GPU)
        if found.processes:
            injected.make_device_files(container.runc_state().init_process_pid, found.given)
            gpu.resume_restored(container, found.processes, found.engine, found.device_map)
            headroom.restored(container, found)
        failpoint.reach("restored")
    except Exception as error:
        text = f"container {container.id}: restored from {found.source}, but {error}"
        raise RestoreError(f"{_explained(container, text)}; {_kill(container)}") from error
    container.given, container.restore = found.given, None
    log.info(
        "restored",
        id=container.id,
        phase="criu_restore",
        images=found.source,
        engine=found.engine,
        seconds=criu,
    )
    return reply


def _annotated(notes: dict[str, str], container: Container) -> str:
    """The image directory the annotation means for this container, "" if none does."""
    directory = notes.get(ANNOTATION)
    if not directory or cri.is_sandbox(notes):
        return ""
    there = _identity(directory, container.config)  # raises before anything is looked for there
    if notes.get(GRIT_RESTORE):
        _await_download(container, directory)
        there = _identity(directory, container.config)
    images = None
    if there or not container.config.checkpoint_roots:
        images = checkpoint_dir.find_checkpoint(directory, cri.container_name(notes))
    if images:
        return images
    if container.config.on_missing_checkpoint == "fail":
        raise RestoreError(
            f"container {container.id}: the annotation {ANNOTATION}={directory} names no "
            "checkpoint, and on_missing_checkpoint is fail"
        )
    log.warning(
        "no checkpoint where the annotation points; starting from the beginning",
        id=container.id,
        directory=directory,
    )
    return ""


def _identity(directory: str, settings: GritOptions) -> Identity | None:
    """None where no roots are configured, or there is no such directory beneath them."""
    if not settings.checkpoint_roots:
        return None
    from shim import confined

    return confined.locate(directory, settings.checkpoint_roots, settings.trusted_uids)


def _require_same(container: Container, found: Restore) -> None:
    """Raises RestoreError where the images that were verified have given way to others."""
    if found.identity and found.identity != _identity(found.source, container.config):
        raise RestoreError(
            f"container {container.id}: another directory has taken the place of {found.source} "
            "since it was verified. Nothing of it was restored; look at who writes there"
        )


def _await_download(container: Container, directory: str) -> None:
    """Waits until GRIT's agent has said that all of the pod's checkpoint is here. Raises
    RestoreError after `download_timeout`, for the kubelet to try again."""
    limit = container.config.download_timeout
    deadline = time.monotonic() + limit
    while not checkpoint_dir.is_downloaded(directory):
        if time.monotonic() >= deadline:
            raise RestoreError(
                f"container {container.id}: the checkpoint in {directory} is not whole after "
                f"{limit:g} s: there is no file {checkpoint_dir.DOWNLOADED} in it, which GRIT's "
                "agent writes when its download has ended. Nothing was started; the kubelet will "
                "try again. Look at the agent's job, or raise download_timeout"
            )
        time.sleep(_LOOK_SECONDS)


def _verified(images: str, settings: GritOptions, *, beside: bool) -> Manifest | None:
    """The manifest, after every file was compared with it, and what lies `beside` with its own
    sums. None for images without one. Raises CheckpointDirError for what is damaged, could be
    another user's work, or is not signed where `verify_keys` asks for it."""
    from shim import confined

    keys = settings.verify_keys
    suspicious = confined.untrusted(images, settings.trusted_uids)
    if suspicious:
        raise CheckpointDirError(
            f"the checkpoint {images} was not restored, since others than root could have changed "
            f"it: {checkpoint_dir.listed(suspicious)}"
        )
    problems = checkpoint_dir.verify_beside(images, keys) if beside else []
    manifest = None
    try:
        manifest = checkpoint_dir.load(images, keys)
    except checkpoint_dir.ForeignCheckpoint:
        if keys:
            raise
        log.warning("images without a manifest: restored unverified", images=images)
    if manifest is not None:
        # The lane's files are read, and compared, when they are filled in. Where not everybody is
        # believed, nothing is decompressed that was not compared before.
        filled = lane.files(manifest, packed=not keys)
        found = checkpoint_dir.verify(images, manifest, but=filled)
        # CRIU would take some files for images that the manifest does not know.
        problems += [one for one in found if keys or one.kind != "extra"]
    if problems:
        raise CheckpointDirError(
            f"the checkpoint {images} is damaged and was not restored: "
            f"{checkpoint_dir.listed(problems)}"
        )
    return manifest


def _decrypted(container: Container, images: str, manifest: Manifest) -> str:
    """Where the images lie in the clear, until Start has ended: `container.plain`. Raises
    RestoreError."""
    what = f"container {container.id}: the checkpoint {images} is encrypted"
    kind = manifest.encryption
    if kind["algorithm"] != sealed.ALGORITHM:
        raise RestoreError(f"{what} by {kind['algorithm']}, which this grit does not know")
    began = time.monotonic()
    wanted = sum(file.size for file in manifest.files.values())
    try:
        key = sealed.key_for(container.config, kind["key"])
        container.plain = Draft.plain(container.plain_in)
        target = container.plain.path
        journal.note(container, journal.DECRYPTING, images=images, plain=target)
        room = os.statvfs(target)
        free = room.f_bavail * room.f_frsize
        if free < wanted:
            raise RestoreError(
                f"{what}, and {container.plain_in} has {free} bytes free of the {wanted} it is to "
                "be decrypted to: free space, or set scratch_dir to another directory"
            )
        sealed.open_all(images, target, list(manifest.files), key, kind["id"])
        lane.take_digests(manifest, target)
    except OSError as error:
        raise RestoreError(
            f"{what}, and cannot be decrypted: {checkpoint_dir.reason(error)}"
        ) from error
    except CheckpointDirError as error:
        raise RestoreError(f"{what} and was not restored: {error}") from error
    journal.note(container, journal.DECRYPTED)
    took = time.monotonic() - began
    log.info("decrypted", id=container.id, phase="decrypt", bytes=wanted, seconds=round(took, 3))
    return target


def _fit_gpus(container: Container, found: Restore, spec: dict[str, Any]) -> None:
    """Settles which GPUs the processes get, and that this node can give them. Raises RestoreError
    or devices.DeviceError with what does not fit."""
    assert found.manifest is not None
    what = (
        f"container {container.id}: {found.images} holds {len(found.processes)} CUDA processes "
        f"suspended by the {found.engine} engine, and this node cannot bring them back"
    )
    try:
        library, survey = gpu.require(container, found.engine)
    except CudaError as error:
        raise RestoreError(f"{what}: {error}") from error
    held: dict[str, int] = {}
    for process in found.processes:
        for uuid, figure in process.gpus.items():
            held[uuid] = held.get(uuid, 0) + figure
    found.given = devices.of_spec(spec, container.runc.binary_name)
    found.device_map = devices.successors(
        found.manifest.gpus,
        found.given,
        bundle.annotations_of(spec).get(devices.ANNOTATION, ""),
        held=held,
        free={device.uuid: device.free for device in survey.devices},
    )
    if not found.device_map:
        return
    if found.engine == "plugin":
        raise RestoreError(
            f"the checkpoint was made on other GPUs ({found.device_map}) by the plugin engine, and "
            "CRIU's CUDA plugin knows no device map: restore it on the same GPUs, or checkpoint "
            'with engine = "driver"'
        )
    if library.cuda_version < states.DEVICE_MAP_CUDA:
        raise RestoreError(
            f"{what}: it was made on other GPUs ({found.device_map}), and a device map needs "
            f"driver r580 or later; {library.path} has CUDA {library.cuda_version // 1000}."
            f"{library.cuda_version % 1000 // 10}"
        )


def _write_criu_config(
    container: Container,
    spec: dict[str, Any],
    found: Restore,
    injections: list[tuple[str, str | None]],
) -> None:
    """Writes the options `runc restore` does not pass on into a CRIU configuration file, with
    what the container's own or runc's file says before them and the mounts that runc does not
    know after them."""
    notes = bundle.annotations_of(spec)
    settings = container.config
    made_with = found.manifest.options if found.manifest else {}
    lines: list[tuple[str, str | None]] = []
    if settings.tcp == "close":
        lines.append(("tcp-close", None))
    elif _keeps_connections(container, found):
        lines.append(("tcp-established", None))
    if settings.file_locks or made_with.get("file_locks"):
        lines.append(("file-locks", None))
    if settings.ext_unix_sockets or made_with.get("ext_unix_sockets"):
        lines.append(("ext-unix-sk", None))
    if found.engine == "plugin":
        lines.append(("libdir", gpu.plugin_directory(settings)))
    elif found.engine == "driver":
        lines.append(("libdir", criu_config.NO_PLUGINS))
    if found.in_lane:
        lines.append(("leave-stopped", None))  # until `lane` has filled them in
    base = notes.get(request.CONFIG_ANNOTATION, request.DEFAULT_CONFIG_FILE) or None
    path = os.path.join(container.bundle, bundle.RESTORE_CONFIG)
    bundle.replace(path, criu_config.file_text([*lines, *injections], base), mode=0o600)
    bundle.replace(os.path.join(container.bundle, bundle.BASE_CONFIG), base or "", mode=0o600)
    spec["annotations"] = {**notes, request.CONFIG_ANNOTATION: path}
    bundle.write_spec(container.bundle, spec)


def _connections_of(container: Container, found: Restore, pod: Pod) -> AbstractContextManager[None]:
    if not _keeps_connections(container, found):
        return nullcontext()
    from shim import loopback

    if pod.ends is None:
        pod.ends = loopback.Ends()
    return pod.ends.restoring(container, found.images)


def _keeps_connections(container: Container, found: Restore) -> bool:
    if container.config.tcp != "refuse":
        return container.config.tcp == "established"
    return found.manifest is not None and bool(found.manifest.options.get("tcp_established"))


def _thaw(container: Container) -> None:
    """On cgroup v1 a container dumped frozen comes back frozen (CRIU 4.2: cgroup.c), and nobody
    may ask the driver about it until it runs."""
    group = container.freezer()
    if not freezer.put_back(group, freezer.THAWED, _THAW_SECONDS):
        raise RestoreError(f"its control group {group} stays frozen")


def _explained(container: Container, message: str) -> str:
    """The inner shim's message with the reason out of CRIU's log, which is kept: the bundle and
    its work directory go with the task."""
    source = os.path.join(bundle.work_directory(container.bundle), "restore.log")
    text = read_log(source)
    if not text:
        return message
    kept = os.path.join(places.FAILURES, f"{container.namespace}-{container.id}-restore.log")
    reason = first_error(text)
    # One that was killed leaves a log without an error, which explains nothing.
    reason = "; ".join(filter(None, (reason, explain(text)))) if reason else _NO_ERROR
    try:
        os.makedirs(places.FAILURES, mode=0o700, exist_ok=True)
        shutil.copyfile(source, kept)
    except OSError as error:
        kept = f"lost ({error.strerror})"
    return f"{message}; {reason}; log: {kept}"


def _kill(container: Container) -> str:
    """Ends a container that came back without its GPU; says whether that worked. Returns when it
    has ended: CRI deletes the task at once, and never again."""
    try:
        ended = container.kill(_KILL_SECONDS)
    except Exception as error:
        return f"it could not be killed: {error}"
    return "it was killed" if ended else f"it was killed, and has not ended in {_KILL_SECONDS:g} s"


if TYPE_CHECKING:
    from typing import Any
