"""`gritctl suspend` and `resume`: a container's GPU given back to the node, and taken again."""

from __future__ import annotations

import click

from shim.gritctl import containerd, output, targets
from shim.gritctl import messages as m
from shim.gritctl.containerd import TASKS, Call, Containerd, ContainerdError
from shim.gritctl.interrupts import Interrupted, Interrupts
from shim.gritctl.saving import memory_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.gritctl.targets import Target


class SuspendError(Exception):
    """Not all was suspended, so nothing was; says why."""


@click.command("suspend", short_help="give a container's GPU back to the node")
@click.argument("name", metavar="CONTAINER|POD", shell_complete=containerd.complete)
@containerd.options
@output.json_option
def suspend(name: str, namespace: str, address: str, as_json: bool) -> int:
    """Copy the GPU memory of a container, or of all containers of a pod, to the host and freeze it.
    The GPU is free for others then, and `gritctl resume` goes on where it stopped.

    The copy lies in the container's memory: it counts towards its memory limit.

    \b
    Examples:
      gritctl suspend job
      gritctl resume job
    """
    with Containerd(address, namespace) as connection, Interrupts() as interrupts:
        found, _ = targets.find(connection, name)
        for target in found:
            if target.task.status == m.PAUSED:
                raise ContainerdError(
                    "FAILED_PRECONDITION", f"container {target} is paused already"
                )
        before = [_memory(connection, target) for target in found]
        calls = [(target, _begin(connection, "Pause", target)) for target in found]
        paused, failures = [], []
        for target, call in calls:
            try:
                call.result()
                paused.append(target)
            except ContainerdError as error:
                failures.append(str(error))
        if failures:
            raise SuspendError("; ".join([*failures, *_undone(connection, paused)]))
        if interrupts.came:
            raise Interrupted("; ".join(["interrupted", *_undone(connection, paused)]))
        rows = [
            (target.id, max(0, _memory(connection, target) - size))
            for target, size in zip(found, before, strict=True)
        ]
    if as_json:
        output.print_json([{"container": id_, "bytes": copied} for id_, copied in rows])
        return 0
    for id_, copied in rows:
        print(f"{id_}: frozen, {output.size(copied)} of GPU memory on the host")
    return 0


@click.command("resume", short_help="let a suspended container go on")
@click.argument("name", metavar="CONTAINER|POD", shell_complete=containerd.complete)
@containerd.options
def resume(name: str, namespace: str, address: str) -> int:
    """Let a suspended container, or all containers of a pod, go on, with its GPU. Also after a
    checkpoint whose client was killed. Can be called again if the GPU was taken meanwhile.

    \b
    Example:
      gritctl resume job
    """
    with Containerd(address, namespace) as connection:
        found, _ = targets.find(connection, name)
        for target in found:
            connection.do(TASKS, "Resume", m.TaskRef(container_id=target.id))
            print(f"{target.id}: runs")
    return 0


def _begin(connection: Containerd, method: str, target: Target) -> Call[m.Nothing]:
    return connection.begin(TASKS, method, m.TaskRef(container_id=target.id), m.Nothing)


def _undone(connection: Containerd, paused: list[Target]) -> list[str]:
    """Resumes those that were paused; a line for each."""
    lines = []
    for target in paused:
        try:
            _begin(connection, "Resume", target).result()
            lines.append(f"{target} runs on")
        except ContainerdError as error:
            lines.append(f"{target} could not be resumed: {error}")
    return lines


def _memory(connection: Containerd, target: Target) -> int:
    return sum(map(memory_of, connection.pids(target.id)))
