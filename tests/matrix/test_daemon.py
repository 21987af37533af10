"""The shim's daemon is held right before a phase begins, and then something happens: to it, to
containerd, to the client, or in the phase itself."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

import pytest

from shim import failpoint
from shim.gritctl.containerd import ContainerdError
from shim.ttrpc import ConnectionClosed, StatusError
from tests.e2e.faults import Direct
from tests.e2e.gpu import ENVIRONMENT_OF_GRIT, until
from tests.matrix.cell import IMAGES
from tests.matrix.strikes import AT_ITS_LIMIT, needs_memory_groups, struck

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    from tests.e2e.failpoints import Held
    from tests.matrix.cell import Cell

AFTER = ("let-go", "thaw", "refill", "give-back")
"""Phases of a checkpoint that begin when it is whole already."""

MENDED = ("thaw", "refill", "give-back")
"""Phases whose failure the shim tells and leaves to the next Resume."""

IN_CREATE = ("verify", "create", "fill")
IN_START = ("restore", "restore-gpu", "restored")
"""Phases of a restore, by the call that they are in."""

PASSED_OVER = ("lane", "drop")
"""What was not written before the freeze is after it; without the lane, CRIU moves the memory."""


def strike(cell: Cell, sig: signal.Signals) -> None:
    os.kill(cell.node.host_pid(cell.daemon), sig)


def stop(cell: Cell, pid: int) -> int:
    """Stops the daemon, by its pid in the node, and waits for that; its pid on the host."""
    daemon = cell.node.host_pid(pid)
    os.kill(daemon, signal.SIGSTOP)
    state = cell.node.path(f"/proc/{pid}/stat")
    until("its halt", lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    return daemon


def go_on_at_its_limit(cell: Cell, held: Held, pid: int, client: Future[str]) -> str:
    """Has the daemon go on where it gets no memory; what the client is told."""
    held.listens()
    with struck(cell.node.host_pid(pid), AT_ITS_LIMIT):
        with contextlib.suppress(BrokenPipeError):  # it could not even hear it
            held.go_on()
        told = client.result(60)
    held.remove()
    return told


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
@pytest.mark.parametrize("error", ["raise", "ENOSPC", "EIO"])
def test_error_in_a_checkpoint(cell: Cell, phase: str, error: str) -> None:
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    held.go_on(error)
    told = client.result(60)
    what = {"raise": "failpoint", "ENOSPC": "No space left", "EIO": "Input/output"}[error]
    if phase in PASSED_OVER:
        assert told == ""
    else:
        assert what in told
    if phase in MENDED:
        with contextlib.suppress(ContainerdError):  # one that runs is not resumed
            cell.box.begin("Resume").result()
    came = cell.alive(whole=phase in MENDED + PASSED_OVER)
    cell.came(f"an error ({error})", "checkpoint", phase, came)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
@pytest.mark.parametrize("error", ["raise", "ENOSPC", "EIO"])
def test_error_in_a_restore(cell: Cell, phase: str, error: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    held.reached()
    held.go_on(error)
    came = cell.restorable(client.result(60))
    cell.came(f"an error ({error})", "restore", phase, came)


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_daemon_killed_in_a_checkpoint(cell: Cell, phase: str) -> None:
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    strike(cell, signal.SIGKILL)
    held.remove()
    came = cell.dead(client.result(60), whole=phase in AFTER)
    cell.came("daemon killed", "checkpoint", phase, came)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_daemon_killed_in_a_restore(cell: Cell, phase: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    pid = held.reached()
    os.kill(cell.node.host_pid(pid), signal.SIGKILL)
    held.remove()
    cell.came("daemon killed", "restore", phase, cell.restorable(client.result(60)))


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_daemon_stopped_in_a_checkpoint(cell: Cell, phase: str) -> None:
    """For a while: nobody takes it for dead, and it goes on where it was."""
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    os.kill(stop(cell, cell.daemon), signal.SIGCONT)
    held.go_on()
    assert client.result(60) == ""
    cell.came("daemon stopped for a while", "checkpoint", phase, cell.alive(whole=True))


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_daemon_stopped_in_a_restore(cell: Cell, phase: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    os.kill(stop(cell, held.reached()), signal.SIGCONT)
    held.go_on()
    assert client.result(60) == ""
    cell.came("daemon stopped for a while", "restore", phase, cell.restored())


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_daemon_stopped_and_killed_in_a_checkpoint(cell: Cell, phase: str) -> None:
    held = cell.held(phase)
    client = cell.checkpoint()
    os.kill(stop(cell, held.reached()), signal.SIGKILL)
    held.remove()
    came = cell.dead(client.result(60), whole=phase in AFTER)
    cell.came("daemon stopped, then killed", "checkpoint", phase, came)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_daemon_stopped_and_killed_in_a_restore(cell: Cell, phase: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    os.kill(stop(cell, held.reached()), signal.SIGKILL)
    held.remove()
    came = cell.restorable(client.result(60))
    cell.came("daemon stopped, then killed", "restore", phase, came)


@needs_memory_groups
@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_daemon_out_of_memory_in_a_checkpoint(cell: Cell, phase: str) -> None:
    """The kernel takes it at the limit of its control group, soon after the phase has begun."""
    held = cell.held(phase)
    client = cell.checkpoint()
    told = go_on_at_its_limit(cell, held, held.reached(), client)
    came = cell.dead(told, whole=phase in AFTER)
    cell.came("daemon at its memory limit", "checkpoint", phase, came)


@needs_memory_groups
@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_daemon_out_of_memory_in_a_restore(cell: Cell, phase: str) -> None:
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    told = go_on_at_its_limit(cell, held, held.reached(), client)
    cell.came("daemon at its memory limit", "restore", phase, cell.restorable(told))


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_containerd_killed_in_a_checkpoint(cell: Cell, phase: str) -> None:
    """The client's connection ends with it: what is whole stays, what is not is undone."""
    held = cell.held(phase)
    client = cell.checkpoint()
    held.reached()
    cell.node.kill_containerd()
    assert client.result(60)
    cell.node.start_containerd(env=ENVIRONMENT_OF_GRIT)
    cell.reconnect()
    held.go_on()
    until("the checkpoint", cell.node.path(f"{IMAGES}/grit.json").exists)
    cell.came("containerd killed", "checkpoint", phase, cell.alive(whole=True))


@pytest.mark.parametrize("phase", failpoint.CHECKPOINT)
def test_connection_dropped_in_a_checkpoint(cell: Cell, phase: str) -> None:
    """A client of the shim's own socket goes away."""
    held = cell.held(phase)
    client = Direct(cell.box)  # type: ignore[arg-type]
    asked = cell._pool.submit(_given_up, lambda: client.checkpoint(IMAGES))
    held.reached()
    client.client.close()
    assert asked.result(60)
    held.go_on()
    until("the checkpoint", cell.node.path(f"{IMAGES}/grit.json").exists)
    cell.came("connection dropped", "checkpoint", phase, cell.alive(whole=True))


def _given_up(call: Callable[[], object]) -> str:
    try:
        call()
    except (ConnectionClosed, ContainerdError, StatusError, OSError) as error:
        return repr(error)
    return ""


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_containerd_killed_in_a_restore(cell: Cell, phase: str) -> None:
    """A container that has been restored goes on; of one that has not, the new containerd ends the
    shim."""
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell.restore()
    held.reached()
    cell.node.kill_containerd()
    told = client.result(60)
    cell.node.start_containerd(env=ENVIRONMENT_OF_GRIT)
    cell.reconnect()
    if phase in IN_CREATE or phase == "restore":
        held.remove()
        came = cell.restorable(told)
    else:
        held.go_on()
        came = cell.restored()
    cell.came("containerd killed", "restore", phase, came)


@pytest.mark.parametrize("phase", failpoint.RESTORE)
def test_client_gone_in_a_restore(cell: Cell, phase: str) -> None:
    """containerd gives up what it was doing for that client: the shim of a task that is being
    created is ended, wherever it is; one that is being started starts."""
    cell.end_by_checkpoint()
    held = cell.held(phase)
    client = cell._pool.submit(_given_up, lambda: cell.box.begin_run().result())
    held.reached()
    cell.reconnect()
    told = client.result(60)
    assert told
    if phase in IN_CREATE:
        until("its removal", lambda: not cell.box.rootfs().parent.exists())
        held.remove()
        came = cell.restorable(told)
    else:
        held.go_on()
        came = cell.restored()
    cell.came("client's connection dropped", "restore", phase, came)


@pytest.mark.parametrize("phase", IN_START)
def test_connection_dropped_in_a_restore(cell: Cell, phase: str) -> None:
    """A client of the shim's own socket goes away."""
    cell.end_by_checkpoint()
    held = cell.held(phase)
    cell.box.create()
    client = Direct(cell.box)  # type: ignore[arg-type]
    asked = cell._pool.submit(_given_up, lambda: client.call("Start"))
    held.reached()
    client.client.close()
    assert asked.result(60)
    held.go_on()
    cell.came("connection dropped", "restore", phase, cell.restored())
