"""`gritctl restore`: a new container from a checkpoint, with containerd alone.

It makes the snapshot, the container and the task as `ctr run` would, from what the checkpoint says
of the old ones, and names the checkpoint in the annotation that the shim restores from.
"""

from __future__ import annotations

import base64
import os
import tempfile

import click

from shim import checkpoint_dir, config, confined
from shim.gritctl import containerd, output, stored
from shim.gritctl import messages as m
from shim.gritctl.containerd import (
    CONTAINERS,
    SNAPSHOTS,
    TASKS,
    Containerd,
    ContainerdError,
)
from shim.gritctl.interrupts import Interrupted, Interrupts
from shim.gritctl.stored import text
from shim.restore import ANNOTATION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.protowire import Message

_SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"


class RestoreError(Exception):
    """Nothing was restored; says why."""


@click.command("restore", short_help="bring a container back from a checkpoint")
@click.argument("directory", metavar="DIR", type=click.Path())
@click.option("--name", help="The new container's id; the old one's if not given.")
@click.option(
    "--annotation",
    "annotations",
    metavar="KEY=VALUE",
    multiple=True,
    help="For the new container; may be given several times.",
)
@click.option("--log", metavar="FILE", help="Where its output goes; nowhere if not given.")
@containerd.options
@output.json_option
def command(
    directory: str,
    name: str | None,
    annotations: tuple[str, ...],
    log: str | None,
    namespace: str,
    address: str,
    as_json: bool,
) -> int:
    """Start a new container from the checkpoint in DIR, which `gritctl checkpoint` has made: with
    the image, mounts, devices and options of the old one. It goes on where the old one was.

    Every file is checked against its checksum first; each GPU process is checked to run. The image
    must be on the node. The annotation grit.dev/device-map=GPU-old=GPU-new,... names other GPUs,
    where grit cannot find them out.

    Containers of a pod are brought back by Kubernetes: give the new pod the annotation
    grit.dev/checkpoint=DIR.

    \b
    Examples:
      gritctl restore /var/lib/checkpoints/job
      gritctl restore /var/lib/checkpoints/job --name job2 --log /var/log/job2.log
      gritctl restore /var/lib/checkpoints/job --name job3 --annotation example.org/run=7
    """
    notes = dict(_annotation(note) for note in annotations)
    one = opened(directory)
    with Containerd(address, namespace) as connection, Interrupts() as interrupts:
        made = Restoring(connection, one, name or one.container, notes, log or "", interrupts)
        pid = made.run()
    if as_json:
        output.print_json({"container": made.id, "pid": pid})
    else:
        print(f"{made.id}: runs, pid {pid}, restored from {one.directory}")
    return 0


def opened(directory: str) -> stored.Stored:
    """The checkpoint of one container, by those whose checkpoints are restored here. Raises
    RestoreError, CheckpointDirError, NotACheckpoint."""
    containers = stored.open_all(directory)
    if len(containers) > 1 or containers[0].name:
        raise RestoreError(
            f"{directory} is a pod's checkpoint: give the new pod the annotation "
            f"{ANNOTATION}={os.path.abspath(directory)}"
        )
    (one,) = containers
    if one.manifest_error and not one.foreign:
        raise RestoreError(one.manifest_error)
    _require_trusted(one)
    return one


def require_image(
    connection: Containerd, snapshotter: str, parent: str, image: str, name: str
) -> None:
    """Raises RestoreError where a container `name` could not be made of the image: now, rather than
    when it has been saved elsewhere and stands still."""
    try:
        if parent:
            reference = m.SnapshotRef(snapshotter=snapshotter, key=parent)
            connection.call(SNAPSHOTS, "Stat", reference, m.OneSnapshot)
    except ContainerdError as error:
        if error.code == "NOT_FOUND":
            raise _no_image(connection, snapshotter, image) from error
        raise
    try:
        connection.call(CONTAINERS, "Get", m.Id(id=name), m.OneContainer)
    except ContainerdError as error:
        if error.code == "NOT_FOUND":
            return
        raise
    raise _name_taken(name)


class Restoring:
    """A container on its way back under the id `id_`; its output goes to the file `log`, "" for
    nowhere."""

    def __init__(
        self,
        connection: Containerd,
        one: stored.Stored,
        id_: str,
        notes: dict[str, str],
        log: str,
        interrupts: Interrupts,
    ) -> None:
        self.containerd = connection
        self.interrupts = interrupts
        self.id = id_
        self._made: list[tuple[str, str, Message]] = []  # and how it is removed
        config, error = one.document(checkpoint_dir.CONFIG_DUMP)
        spec, error_ = one.document(checkpoint_dir.SPEC_DUMP)
        ours = config.get("grit")
        if error or error_ or not spec or not isinstance(ours, dict):
            reason = error or error_ or "gritctl did not make it: it does not say from what"
            raise RestoreError(f"{one.directory} cannot be made a container of: {reason}")
        self.config, self.ours = config, ours
        self.spec = _adapted(spec, one, config, id_, notes)
        if ours.get("terminal") is True:
            raise RestoreError(
                f"container {one.container} has a terminal, which gritctl cannot give it: restore "
                f"it with ctr run --tty and the annotation {ANNOTATION}={one.directory}"
            )
        # Pipes, as the old one had; without them it could not be saved again (CRIU finds the
        # node's own /dev/null in it).
        self.log = f"file://{os.path.abspath(log or os.devnull)}"
        self.snapshot = m.SnapshotRef(
            snapshotter=text(ours.get("snapshotter")), key=id_, parent=text(ours.get("parent"))
        )

    def run(self) -> int:
        """The new container's pid. Raises RestoreError or ContainerdError, with nothing left."""
        undo = self._made
        try:
            mounts = self._prepare()
            undo.append((SNAPSHOTS, "Remove", self.snapshot))
            self.containerd.call(CONTAINERS, "Create", self._container(), m.OneContainer)
            undo.append((CONTAINERS, "Delete", m.Id(id=self.id)))
            reference = m.TaskRef(container_id=self.id)
            with tempfile.TemporaryDirectory(prefix="gritctl-") as directory:
                # The stock shim has opened it by the time the task has started.
                stdin = os.path.join(directory, "stdin")
                os.mkfifo(stdin, 0o600)
                task = m.NewTask(
                    container_id=self.id,
                    rootfs=mounts,
                    stdin=stdin,
                    stdout=self.log,
                    stderr=self.log,
                )
                self.containerd.do(TASKS, "Create", task)
                undo.append((TASKS, "Delete", reference))
                self.containerd.do(TASKS, "Start", reference)
            if self.interrupts.came:  # a restore under way is not to be cut short: it ends first
                raise Interrupted("interrupted")
            started = self.containerd.task(self.id)
        except ContainerdError as error:
            raise RestoreError(f"{error}. {self.take_back()}") from error
        except Interrupted as error:
            raise Interrupted(f"{error}. {self.take_back()}") from None
        except BaseException:
            self.take_back()
            raise
        return started.pid if started else 0

    def _prepare(self) -> list[m.Mount]:
        image = text(self.config.get("rootfsImageName"))
        try:
            return self.containerd.call(SNAPSHOTS, "Prepare", self.snapshot, m.Mounts).mounts
        except ContainerdError as error:
            if error.code == "NOT_FOUND":
                raise _no_image(self.containerd, self.snapshot.snapshotter, image) from error
            if error.code == "ALREADY_EXISTS":
                raise _name_taken(self.id) from error
            raise

    def _container(self) -> m.OneContainer:
        options = self.ours.get("runtime_options")
        options = options if isinstance(options, dict) else {}
        try:
            value = base64.b64decode(text(options.get("value")), validate=True)
        except ValueError as error:
            raise RestoreError(f"config.dump: grit.runtime_options.value: {error}") from error
        labels = self.ours.get("labels")
        return m.OneContainer(
            container=m.Container(
                id=self.id,
                labels={k: text(v) for k, v in labels.items()} if isinstance(labels, dict) else {},
                image=text(self.config.get("rootfsImageName")),
                runtime=m.Runtime(
                    name=text(self.config.get("runtime")),
                    options=m.Any(type_url=text(options.get("type_url")), value=value)
                    if options.get("type_url")
                    else None,
                ),
                spec=m.Any(type_url=_SPEC, value=output.compact_json(self.spec)),
                snapshotter=self.snapshot.snapshotter,
                snapshot_key=self.id,
            )
        )

    def take_back(self) -> str:
        """Ends and removes what was made; says what could not be."""
        failures = []
        for service, method, request in reversed(self._made):
            try:
                if method == "Delete" and service == TASKS:
                    self._kill()
                self.containerd.do(service, method, request)
            except ContainerdError as error:
                if error.code != "NOT_FOUND":
                    failures.append(f"{method}: {error}")
        self._made.clear()
        if failures:
            return f"What there is of container {self.id} could not be removed: " + "; ".join(
                failures
            )
        return "Nothing of it is left"

    def _kill(self) -> None:
        task = self.containerd.task(self.id)
        if task and task.status not in (m.STOPPED, m.CREATED):
            reference = m.TaskRef(container_id=self.id)
            ended = self.containerd.begin(TASKS, "Wait", reference, m.Waited)
            kill = m.KillTask(container_id=self.id, signal=9, all=True)
            self.containerd.do(TASKS, "Kill", kill)
            ended.result()


def _no_image(connection: Containerd, snapshotter: str, image: str) -> RestoreError:
    return RestoreError(
        f"the image {image or '(unknown)'} is not unpacked on this node for the snapshotter "
        f"{snapshotter}: ctr -n {connection.namespace} images pull {image}"
    )


def _name_taken(name: str) -> RestoreError:
    return RestoreError(
        f"there is a container or snapshot {name} already; --name gives the new one another name"
    )


def _require_trusted(one: stored.Stored) -> None:
    """Raises CheckpointDirError where others may have written what the new container is made of:
    the shim looks at it again, but the container's rights and mounts come from here."""
    settings = config.load()[1]
    problems = confined.untrusted(one.images, settings.trusted_uids)
    if settings.verify_keys:
        problems += checkpoint_dir.verify_beside(one.images, settings.verify_keys)
    if problems:
        raise RestoreError(f"{one.directory} was not restored: {checkpoint_dir.listed(problems)}")


def _annotation(note: str) -> tuple[str, str]:
    key, mark, value = note.partition("=")
    if not mark or not key:
        raise click.BadParameter(f"{note!r} is not KEY=VALUE", param_hint="--annotation")
    return key, value


def _adapted(
    spec: dict[str, Any],
    one: stored.Stored,
    config: dict[str, Any],
    id_: str,
    notes: dict[str, str],
) -> dict[str, Any]:
    """The old container's specification for a new one of that id."""
    found = spec.get("linux")
    linux: dict[str, Any] = found if isinstance(found, dict) else {}
    joined = [
        text(space.get("path"))
        for space in linux.get("namespaces") or []
        if isinstance(space, dict) and space.get("path")
    ]
    gone = [path for path in joined if not os.path.exists(path)]
    if gone:
        raise RestoreError(
            f"container {one.container} was in the namespaces of others ({gone[0]}), which are "
            "gone: it belonged to a pod. Give a new pod the annotation "
            f"{ANNOTATION}={one.directory}"
        )
    parent, _, last = text(linux.get("cgroupsPath")).rpartition("/")
    if last and last == config.get("id"):
        spec["linux"] = {**linux, "cgroupsPath": f"{parent}/{id_}"}
    old = spec.get("annotations")
    spec["annotations"] = {
        **(old if isinstance(old, dict) else {}),
        ANNOTATION: one.directory,
        **notes,
    }
    return spec
