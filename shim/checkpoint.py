"""The life of a Checkpoint call, top to bottom.

    Pause       look for what stands against it; suspend the GPU (lock; copy device memory to the
                host); write that memory, if the client has announced where to; then freeze
    Checkpoint  dump a GPU-free, frozen container through CRIU's RPC
    Resume      thaw, then fill in the memory that CRIU was not to see, and give the GPU back
                (restore, unlock)

The order is the whole point: a frozen process cannot answer the CUDA driver, so every driver
call is made while the container runs, and so is what need not be done while it stands still. A
Checkpoint without a Pause before it does all three. Each function here leaves the container as it
found it when it fails, and says so if it could not. All of them are called with the container's
lock held.
"""

from __future__ import annotations

import math
import os
import shutil
import time

from shim import (
    ahead,
    announced,
    bundle,
    checkpoint_dir,
    cri,
    devices,
    digests,
    failpoint,
    fit,
    gpu,
    group,
    headroom,
    injected,
    journal,
    lane,
    log,
    messages,
    options,
    patience,
    places,
    preflight,
    proof,
    sealed,
    signing,
    volumes,
)
from shim.criu_bridge import client, freezer, request
from shim.criu_bridge import config as criu_config
from shim.criu_bridge.errors import CriuError
from shim.criu_bridge.transport import Service, Swrk
from shim.cuda import limits, record, states
from shim.manifest import Manifest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.container import Container
    from shim.criu_bridge.rpc import CriuOpts
    from shim.cuda.suspension import Process
    from shim.runcstate import RunState
    from shim.signing import Sign

CRIU_CONFIG = "grit-criu-dump.conf"

_FREEZE_SECONDS = 10.0

_LOST = (
    "the container has ended: CRIU was killed while it had code of its own in a process, which "
    "did not outlive it"
)
_LOSS_SECONDS = 0.5
"""A process that runs what CRIU has left in it ends at once."""

_CLEAR_SECONDS = 10.0
"""How long a client waits for the removal of what failed, which goes on all the same."""

_ROUNDS = 3
"""How often a process that takes up CUDA between suspend and freeze makes us begin again."""


class CheckpointError(Exception):
    """A checkpoint that was refused or failed; the message says what state the container is in."""


def pause(container: Container, connection: int) -> None:
    """Gives the container's GPU back to the node and freezes it, in this order.

    A container without CUDA processes is only frozen. Raises Refused, CudaError, or the inner
    shim's StatusError, with the container running and its GPU its own.
    """
    if container.suspension is None:
        try:
            suspend_and_freeze_ahead(container)
        except BaseException:
            journal.close(container)
            raise
    else:
        container.ask("Pause")  # the stock words for a container that is paused already
    container.paused_by, container.orphanable = connection, False


def checkpoint(
    container: Container, request: messages.CheckpointTaskRequest, connection: int
) -> None:
    """Dumps the container into the image directory the client named; ends it afterwards if the
    client asked for that (`exit`), else leaves it paused if it was, running if it ran.

    Raises Refused, CheckpointError, CudaError, CriuError, SigningError and SealError (before
    anything is done), or the inner shim's StatusError.
    """
    wanted = options.checkpoint_options(request.options)
    target = wanted.image_path or request.path
    if not target:
        raise CheckpointError(f"container {container.id}: the client named no image directory")
    sign, key = signing.signer(container.config.sign_key), sealed.key(container.config)
    begun = _begun_ahead(container, target)
    draft = begun or checkpoint_dir.Draft.begin(target, key, container.plain_in)
    plain = draft.images if key else None
    _note_begun(container, draft)
    try:
        was_paused = container.status() == messages.PAUSED
        if not was_paused:
            suspend_and_freeze(container, draft)
        container.paused_by, container.orphanable = connection, True
        try:
            _make_whole(container)
            if was_paused and not begun:  # else that has been looked at, and written
                preflight.before_dump(container, draft.takes_room_in)
                lane.begin_anew(container)
            _dump(container, draft, wanted, sign)
        except Exception as failure:
            if draft.published and container.has_ended():
                container.forget_pause()
                raise CheckpointError(
                    f"{failure}; the container has ended, and its checkpoint {draft.final} is whole"
                ) from failure
            whole = not lane.is_dropped(container)
            if not whole and container.kept is None and not container.held:
                container.kept = draft  # it has what the processes lack
            # A client that paused it has its Resume still to come.
            left = _left_paused(container, failure) if was_paused else _undo(container, failure)
            if whole:  # now that it runs: the disk may be what failed, or hangs
                left += _withdrawn(container, draft)
            raise CheckpointError(f"{_told(container, failure)}; {left}") from failure
        if wanted.exit:  # CRIU has ended its processes; the inner shim reports their exit
            container.forget_pause()
        elif not was_paused:
            resume(container)
        else:
            log.info(
                "paused until its client resumes it",
                id=container.id,
                by_hand=f"ctr -n {container.namespace} task resume {container.id}",
            )
    finally:
        if container.kept is not draft:
            _discarded(container, draft)
        if container.paused_by is None:
            journal.close(container)
        else:
            made = draft.final if draft.published else None
            kept = container.kept is draft
            journal.note(
                container,
                journal.PAUSED,
                criu=None,
                draft=draft.path if kept else None,
                plain=plain if kept else None,
                checkpoint=made,
            )


def resume(container: Container) -> None:
    """Thaws the container, then gives its GPU back and checks that every CUDA process runs.

    What a failed checkpoint has left in files is filled in before anything runs. Can be called
    again after a failure: what is done already is not done twice. Raises
    CudaError, lane.NotRefilled with the container frozen, or the inner shim's StatusError.
    """
    paused = container.status() == messages.PAUSED
    if not container.held:
        _make_whole(container)
    ended = bool(container.freezer()) and container.has_ended()
    if ended:
        # Nobody else thaws what has ended, and runc deletes nothing that is frozen.
        freezer.put_back(container.freezer(), freezer.THAWED, _FREEZE_SECONDS)
    if container.suspension is None or paused:
        began = time.monotonic()
        if paused and container.freezer() and not ended:
            # A CRIU that was killed leaves it thawed. The inner shim does not look, and runc
            # resumes nothing that runs.
            freezer.put_back(container.freezer(), freezer.FROZEN, _FREEZE_SECONDS)
        failpoint.reach("thaw")
        journal.note(container, journal.THAWING)
        container.ask("Resume")
        container.phases["thaw"] = _since(began)
        log.info("thawed", id=container.id, phase="thaw", seconds=container.phases["thaw"])
    if container.held:
        _fill_in(container)
    if container.suspension is not None:
        failpoint.reach("give-back")
        gpu.resume(container, container.suspension)
    container.forget_pause()
    _drop_ahead(container)


def _fill_in(container: Container) -> None:
    """Fills in the device memory of a container that runs again. Nobody may be left to ask for it
    a second time, so that is done here. Raises lane.NotRefilled with the container frozen."""
    try:
        try:
            lane.refill(container)
        except lane.NotRefilled as error:
            log.warning("once more", id=container.id, error=error)
            lane.refill(container)
    except BaseException:
        try:
            container.ask("Pause")
        except Exception as error:
            log.error("it runs without all of its device memory", id=container.id, error=error)
        raise


def _make_whole(container: Container) -> None:
    """Fills in the device memory that a failed checkpoint has left in files only, or a good one,
    before the container is dumped once more. Raises lane.NotRefilled."""
    lane.refill(container)
    if container.kept is not None:
        container.kept.withdraw()
        container.kept.discard()
        container.kept = None


def abandon(container: Container, why: str, still: Callable[[], bool] = lambda: True) -> None:
    """Resumes a container whose client has vanished, or so it seems: without this it would stand
    frozen for ever. `still`: asked with the lock held, whether it is to be resumed all the same."""
    with container.lock:
        if container.paused_by is None or not still():
            return  # its Checkpoint ended it, or undid itself
        try:
            resume(container)
        except Exception as error:
            log.error(f"{why}; it could not be resumed", id=container.id, error=error)
        else:
            log.warning(f"{why}; the container runs on", id=container.id)


def suspend_and_freeze(container: Container, draft: checkpoint_dir.Draft | None) -> None:
    """Asks what stands against it, locks and copies the CUDA processes, freezes the container, and
    looks once more: a process that took up CUDA in between would be dumped with the GPU attached.
    What was copied is written to the draft before the freeze, if there is one."""
    with gpu.helper(container.config) as driver:
        preflight.before_suspend(container, driver, draft.takes_room_in if draft else {})
        for _ in range(_ROUNDS):
            failpoint.reach("lock")
            suspension = gpu.suspend(container, driver)
            frozen = False
            try:
                if draft is not None:
                    lane.write_ahead(container, driver, suspension, draft.images)
                began = time.monotonic()
                container.meet()
                failpoint.reach("freeze")
                journal.note(container, journal.FREEZING)
                container.ask("Pause")
                frozen = True
                failpoint.reach("look-again")
                late = gpu.missed(container, suspension)
            except BaseException:
                if frozen:
                    container.ask("Resume")
                if suspension:
                    gpu.resume(container, suspension)
                raise
            if not late:
                container.suspension = suspension or None
                container.phases["freeze"] = _since(began)
                container.paused_in = {
                    phase: container.phases[phase]
                    for phase in ("lane_choose", "lane_write", "freeze")
                    if phase in container.phases
                }
                journal.note(container, journal.PAUSED)
                return
            log.warning("a process took up CUDA during the suspension", id=container.id, pids=late)
            container.ask("Resume")
            if draft is not None:
                lane.forget(container, suspension, draft.images)
            if suspension:
                gpu.resume(container, suspension)
    raise CheckpointError(
        f"container {container.id}: in each of {_ROUNDS} attempts a new CUDA process appeared "
        "between suspending the GPU and freezing; the container runs on unchanged. Try again "
        "when it is not starting processes."
    )


def suspend_and_freeze_ahead(container: Container) -> None:
    """The same where a Checkpoint is yet to come: into its draft, if it has been announced."""
    _drop_ahead(container)  # one that is paused already is only refused by the inner shim
    target = announced.directory(container.namespace, container.id)
    if target:
        try:
            key = sealed.key(container.config)
            container.ahead = checkpoint_dir.Draft.begin(target, key, container.plain_in)
            _note_begun(container, container.ahead)
        except (checkpoint_dir.CheckpointDirError, sealed.SealError) as error:
            log.warning("its Checkpoint is going to fail", id=container.id, error=error)
    try:
        suspend_and_freeze(container, container.ahead)
    except BaseException:
        _drop_ahead(container)
        raise


def _drop_ahead(container: Container) -> None:
    """Removes the draft of a Checkpoint that was announced and has not come."""
    draft, container.ahead = container.ahead, None
    if draft is not None:
        _discarded(container, draft)


def _begun_ahead(container: Container, target: str) -> checkpoint_dir.Draft | None:
    """The draft that a Pause has begun for a Checkpoint to `target`. One for another is removed."""
    draft = container.ahead
    if draft is None or draft.final != os.path.realpath(target):
        _drop_ahead(container)
        return None
    container.ahead = None
    return draft


def _note_begun(container: Container, draft: checkpoint_dir.Draft) -> None:
    journal.note(
        container,
        journal.BEGUN,
        draft=draft.path,
        plain=draft.images if draft.key else None,
        final=draft.final,
        checkpoint=None,
    )


def _dump(
    container: Container,
    draft: checkpoint_dir.Draft,
    wanted: messages.CheckpointOptions,
    sign: Sign | None,
) -> None:
    """Has CRIU dump the frozen container into the draft, and publishes the draft, encrypted and
    signed where there are keys, when all images are written but CRIU has not let go yet: a
    checkpoint that cannot be completed is known to fail while there still is a container to go on
    with."""
    settings = container.config
    state = container.runc_state()
    plugin = container.suspension is not None and container.suspension.engine == "plugin"
    cuda = container.suspension.processes if container.suspension else []
    if plugin:
        headroom.make_room(container, cuda)  # CRIU copies, as it dumps
    uncopied = proof.memory_of(cuda) if plugin else {}
    for_cri = cri.checkpoint_directory(container.bundle, container.id)
    ours = for_cri or os.path.join(bundle.work_directory(container.bundle), "criu-work")
    work = wanted.work_path or ours
    os.makedirs(work, mode=0o700, exist_ok=True)
    opts = request.dump_options(
        state,
        request.DumpOptions(
            leave_running=not wanted.exit,
            tcp_established=wanted.open_tcp or settings.tcp == "established",
            tcp_close=settings.tcp == "close",
            ext_unix_sk=wanted.external_unix_sockets or settings.ext_unix_sockets,
            terminal=wanted.terminal or container.terminal,
            file_locks=wanted.file_locks or settings.file_locks,
            empty_namespaces=tuple(wanted.empty_namespaces),
            cgroups_mode=wanted.cgroups_mode,
            link_remap=settings.link_remap,
            ghost_limit=settings.ghost_limit,
            timeout=math.ceil(settings.lock_timeout + settings.dump_timeout),
            config_file=_write_criu_config(container, state, plugin),
        ),
    )
    patience.within(
        settings.dump_timeout,
        f"{draft.images}: the container's descriptors were not written",
        lambda: request.write_descriptors(state, draft.images),
    )
    volumes.save(bundle.read_spec(container.bundle), draft.images, settings.dump_timeout)
    criu = _criu(container, plugin)
    in_lane = lane.write_and_drop(container, draft.images)
    began = time.monotonic()

    def notified(script: str) -> bool:
        if script == "post-dump":
            if plugin:
                _require_copies(container)
            patience.within(
                settings.dump_timeout,
                f"{draft.images}: its images were not looked at",
                lambda: proof.require(cuda, draft.images, uncopied),
            )
            manifest = _manifest(container, opts)
            if draft.key is not None:
                lane.forget_digests(manifest)
            manifest.phases["dump"] = _since(began)
            failpoint.reach("publish")
            journal.note(container, journal.PUBLISHING)
            try:
                whole = patience.within(
                    settings.dump_timeout,
                    f"{draft.path} was not synced to its disk",
                    lambda: draft.publish(
                        manifest, digested.stop(), in_lane, algorithm=algorithm, sign=sign
                    ),
                )
            except patience.DiskHangs:
                draft.give_up()
                raise
            failpoint.reach("let-go")
            journal.note(container, journal.PUBLISHED, checkpoint=draft.final, draft=None)
            names = ("dump", "encrypt", "checksums")
            container.phases |= {n: whole.phases[n] for n in names if n in whole.phases}
            container.sizes["image"] = sum(file.size for file in whole.files.values())
        return True

    def dumped_by(pid: int) -> None:
        journal.note(container, journal.DUMPING, criu=(pid, group.start_time(pid)))

    dumped = False
    algorithm = digests.algorithm(settings)
    digested = ahead.Ahead(draft.path, algorithm)  # where nothing is yet if it is encrypted
    failpoint.reach("dump")
    journal.note(container, journal.DUMPING)
    try:
        with digested:
            result = client.dump(
                criu,
                opts,
                draft.images,
                work,
                on_start=dumped_by,
                on_notify=notified,
                deadline_s=settings.dump_timeout,
                cancel=container.begin_dump(),
            )
        dumped = True
    except CriuError as error:
        raise CheckpointError(_explained(container, error, cuda if plugin else [])) from error
    finally:
        container.end_dump()
        lane.moved(container, draft.images)
        if not dumped or wanted.exit or not _held(container):
            lane.refill(container)
    if work == for_cri:
        for name in ("stats-dump", client.LOG_NAME):  # containerd 2.1.0 to 2.1.8
            try:
                shutil.copy(os.path.join(work, name), os.path.dirname(work))
            except OSError as problem:
                log.warning("CRI will miss a file of CRIU's", id=container.id, error=problem)
    log.info(
        "dumped",
        id=container.id,
        phase="dump",
        seconds=round(result.seconds, 3),
        exit=wanted.exit,
    )


def _held(container: Container) -> bool:
    """Whether what is dropped can wait for the thaw."""
    try:
        lane.hold(container)
    except (OSError, patience.DiskHangs) as error:
        log.warning("device memory is filled in now", id=container.id, reason=error)
        return False
    return True


def _criu(container: Container, plugin: bool) -> Swrk | Service:
    """How to reach CRIU, and in what environment: with its CUDA plugin and our `cuda-checkpoint`
    where the plugin is to copy the device memory, with no plugin at all where that is done."""
    settings = container.config
    if settings.criu_service:
        return Service(settings.criu_service)
    if container.suspension is None or not plugin:
        return Swrk(settings.criu, criu_config.environment())
    answers = _record_path(container)
    record.write(
        answers,
        container.suspension,
        nvidia_command=settings.cuda_checkpoint or "",
        timeout=settings.dump_timeout,
    )
    environment = criu_config.environment(
        plugins=gpu.plugin_directory(settings),
        commands=places.commands(),
        extra={record.VARIABLE: answers},
    )
    return Swrk(settings.criu, environment)


def _write_criu_config(container: Container, state: RunState, plugin: bool) -> str:
    """Writes CRIU's configuration file for this dump and returns its path: what the container's
    own or runc's file says, but for the plugins. A `libdir` there, as an administrator sets for
    the stock path, would have CRIU's CUDA plugin ask about processes that stand still."""
    libdir = gpu.plugin_directory(container.config) if plugin else criu_config.NO_PLUGINS
    base = bundle.criu_config_before(container.bundle, request.default_config_file(state))
    text = criu_config.file_text([("libdir", libdir)], base)
    path = os.path.join(container.bundle, CRIU_CONFIG)
    bundle.replace(path, text, mode=0o600)
    return path


def _record_path(container: Container) -> str:
    return os.path.join(container.bundle, "cuda-record.json")


def _require_copies(container: Container) -> None:
    """CRIU's plugin takes any trouble of `cuda-checkpoint` for "no CUDA here" and dumps on without
    the device memory; our command has noted what was really done."""
    assert container.suspension is not None
    noted = record.read(_record_path(container))
    for process in container.suspension.processes:
        process.state = record.find(noted, process.pid)["state"]
        if process.state != states.CHECKPOINTED:
            raise CheckpointError(
                f"CRIU's CUDA plugin left the device memory of {process} out of the images: the "
                f"process is {process.state}, not checkpointed"
            )


def _manifest(container: Container, opts: CriuOpts) -> Manifest:
    suspension = container.suspension
    notes = bundle.annotations_of(bundle.read_spec(container.bundle))
    system = os.uname()
    state = container.runc_state()
    mounts, device_files = injected.recorded(container, state)
    gpus = container.given or devices.of_running(state.init_process_pid) if suspension else []
    return Manifest(
        container_id=container.id,
        namespace=container.namespace,
        image=cri.image_name(notes),
        runtime="containerd-shim-grit-v1",
        engine=suspension.engine if suspension else "none",
        driver_version=devices.driver_version() if suspension else None,
        gpus=[{"uuid": one["uuid"], "name": one["name"]} for one in gpus],
        criu_version=container.criu_version,
        kernel=system.release,
        hostname=system.nodename,
        cpu=fit.cpu(),
        options={
            "tcp_established": bool(opts.tcp_established),
            "ext_unix_sockets": bool(opts.ext_unix_sk),
            "file_locks": bool(opts.file_locks),
            "terminal": bool(opts.shell_job),
        },
        cuda_processes=[{**process.to_dict(), "dropped_to": ""} for process in suspension.processes]
        if suspension
        else [],
        mounts=mounts,
        devices=device_files,
        compression=lane.compression(container),
        phases={
            **({"suspend": round(suspension.seconds, 6)} if suspension else {}),
            **container.paused_in,
            **{
                phase: round(took, 6)
                for phase, took in container.phases.items()
                if phase.startswith("lane_")
            },
        },
    )


def _since(began: float) -> float:
    return round(time.monotonic() - began, 6)


def _told(container: Container, failure: Exception) -> str:
    """What has failed, as it is once that was undone."""
    again = not lane.is_dropped(container) and not container.has_ended()
    if isinstance(failure, lane.NotRefilled) and again:
        return f"{failure.fact}; it was filled in again since"
    return str(failure)


def _undo(container: Container, failure: Exception) -> str:
    """Resumes a container that only this Checkpoint had paused; says how that went."""
    had_gpu = container.suspension is not None
    try:
        resume(container)
        left = "the container runs on" + (" with its GPU" if had_gpu else "")
    except Exception as error:
        left = f"the container could not be resumed: {error}"
    if _lost_criu(failure) and container.ends_within(_LOSS_SECONDS):
        freezer.put_back(container.freezer(), freezer.THAWED, _FREEZE_SECONDS)
        left = _LOST
    return left


def _left_paused(container: Container, failure: Exception) -> str:
    ended = _lost_criu(failure) and container.has_ended()
    return _LOST if ended else "the container stays paused"


def _withdrawn(container: Container, draft: checkpoint_dir.Draft) -> str:
    """Takes back a checkpoint that was published, if any, with the container running: the disk may
    be what failed. What is to be told of it, "" if all went well."""
    if not draft.published:
        return ""
    what = f"the checkpoint {draft.final} was not removed"
    try:
        patience.within(_CLEAR_SECONDS, what, draft.withdraw)
    except (patience.DiskHangs, checkpoint_dir.CheckpointDirError) as error:
        log.error("a checkpoint that failed is still there", id=container.id, error=error)
        return f"; {error}"
    return ""


def _discarded(container: Container, draft: checkpoint_dir.Draft) -> None:
    """Removes a draft, at the latest when its disk answers. Raises CheckpointDirError; not where
    the checkpoint is whole, which what is left in the clear does not make a failure."""
    what = f"the draft {draft.path} was not removed"
    try:
        patience.within(_CLEAR_SECONDS, what, draft.discard)
    except patience.DiskHangs as error:
        log.warning("a draft is removed when its disk answers", id=container.id, error=error)
    except checkpoint_dir.CheckpointDirError as error:
        if not draft.published:
            raise
        log.error("images were left in the clear", id=container.id, error=error)


def _lost_criu(failure: Exception) -> bool:
    return isinstance(failure.__cause__, CriuError) and failure.__cause__.died


def _explained(container: Container, error: CriuError, copied: list[Process]) -> str:
    """The error for the client in the stock shim's form, first line and the log's path, with
    the log kept where the stock shim keeps it (1.6 pkg/process/init.go). `copied` are the
    processes whose device memory CRIU's plugin was to copy."""
    text = f"container {container.id}: {error}"
    if "cuda" in (error.first_error or ""):
        text += "".join(f"; {process}{limits.suspects(process.pid)}" for process in copied)
    if error.log_path:
        kept = os.path.join(container.bundle, "criu-dump.log")
        try:
            shutil.copyfile(error.log_path, kept)
        except OSError as problem:
            return f"{text} (its log could not be kept: {problem.strerror})"
        text += f" path= {kept}"
    return text
