"""The part of kaito's GRIT agent, replayed call by call (grit: pkg/gritagent/checkpoint/runtime.go,
restore/restore.go, copy/copy.go): how it checkpoints each container of a pod, what it leaves where,
and how it brings that to another node. Nothing here knows which shim is underneath."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import TYPE_CHECKING

from shim import messages
from tests.e2e.pods.kubelet import NAMESPACE
from tests.e2e.pods.services import ServiceError, Services
from tests.nodes.node import SOCKET

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from tests.e2e.pods.kubelet import Pod
    from tests.nodes.node import Node

PAUSED = 4


@contextlib.contextmanager
def tasks_of(node: Node, lease: str = "") -> Iterator[Services]:
    """The node's task service, for CRI's namespace."""
    tasks = Services(node.path(SOCKET), "containerd.proto", NAMESPACE, lease)
    try:
        yield tasks
    finally:
        tasks.close()


def checkpoint_pod(
    pod: Pod, directory: str, names: Iterable[str] = (), exiting: Iterable[str] = ()
) -> None:
    """Every container of the pod, one after the other, into `<directory>/<name>`. GRIT's agent lets
    all run on; those named in `exiting` are to end, as its migration would have it."""
    for name in names or pod.ids:
        with _lease(pod.node) as lease, tasks_of(pod.node, lease) as tasks:
            _checkpoint_container(tasks, pod, name, directory, name in exiting)


@contextlib.contextmanager
def _lease(node: Node) -> Iterator[str]:
    """What containerd's client holds for each checkpoint. Here all that it held is gone at its end:
    1.x stores an empty archive, and says "already exists" where it finds an earlier one."""
    lease = node.ctr("-n", NAMESPACE, "leases", "create").stdout.strip()
    try:
        yield lease
    finally:
        node.ctr("-n", NAMESPACE, "leases", "rm", "--sync", lease)


def _checkpoint_container(
    tasks: Services, pod: Pod, name: str, directory: str, exiting: bool
) -> None:
    identity = pod.ids[name]
    work = f"{directory}/{name}-work"
    os.makedirs(pod.node.path(work), mode=0o755)
    tasks("Pause", container_id=identity)
    try:
        options = messages.CheckpointOptions(
            exit=exiting, image_path=f"{work}/checkpoint", work_path=work
        )
        # containerd's client looks before it pauses, and leaves a paused task to its pauser.
        assert tasks("Get", container_id=identity).process.status == PAUSED
        any_options = {"type_url": messages.CHECKPOINT_OPTIONS, "value": options.encode()}
        tasks("Checkpoint", container_id=identity, options=any_options)
        # Once by the client itself, which stores it away under any runtime not called runc, and
        # once by the agent.
        for target in ("/dev/null", f"{work}/rootfs-diff.tar"):
            diff = f"ctr -n {NAMESPACE} snapshots diff {identity} > {target}"
            pod.node.run(["sh", "-c", diff])
        shutil.copy(pod.node.path(pod.log_path(name)), pod.node.path(f"{work}/container.log"))
    finally:
        try:
            tasks("Resume", container_id=identity)
        except ServiceError:
            assert exiting  # nobody is there to resume, and the agent only logs that
    os.rename(pod.node.path(work), pod.node.path(f"{directory}/{name}"))


def transfer(source: Node, target: Node, directory: str) -> None:
    """What goes over the volume from one node to the other: files and modes, then the word that
    it is whole."""
    copy_tree(source.path(directory), target.path(directory))
    say_downloaded(target, directory)


def say_downloaded(node: Node, directory: str) -> None:
    node.path(f"{directory}/download-state").write_text("Transfer Completed\n")


def copy_tree(source: Path, target: Path) -> None:
    for folder, _, names in os.walk(source):
        there = target / os.path.relpath(folder, source)
        there.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(os.path.join(folder, name), there / name)
