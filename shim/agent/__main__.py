"""The agent's process: looks, waits for a change, and looks again, until SIGTERM."""

from __future__ import annotations

import fcntl
import os
import platform
import signal
import sys
import threading

import click

from shim.agent import settings
from shim.agent.api import Api, ApiError, EventsApi, PodsApi
from shim.agent.checkpoints import Checkpoints
from shim.agent.desk import Desk
from shim.agent.events import Events
from shim.agent.migration import Migration
from shim.agent.pods import Pods
from shim.agent.restores import Restores
from shim.gritctl.containerd import ADDRESS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ATTEND_SECONDS = 0.1
LOCK = "/run/containerd/grit-agent.lock"
"""In a directory that a DaemonSet's pods share with the node: an old and a new one may meet."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--config", default=settings.PATH, envvar="GRIT_AGENT_CONFIG", show_default=True)
@click.option("--node", default=platform.node, envvar="NODE_NAME", help="This node's name.")
@click.option("--address", default=ADDRESS, envvar="CONTAINERD_ADDRESS", show_default=True)
@click.option("--kubeconfig", envvar="KUBECONFIG", help="Else the pod's service account.")
def main(config: str, node: str, address: str, kubeconfig: str | None) -> None:
    """Does what Checkpoint and Restore resources ask for on this node."""
    try:
        found = settings.load(config, node)
        events = Events(EventsApi(kubeconfig), node, _say)
        of_checkpoints = Api("checkpoints", kubeconfig, events.changed)
        of_restores = Api("restores", kubeconfig, events.changed)
        of_pods = PodsApi(kubeconfig)
    except (settings.SettingsError, ApiError) as error:
        raise click.ClickException(str(error)) from None
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _say("another agent runs on this node: waiting for its end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    pods = Pods(address)
    migration = Migration(of_restores, of_pods)
    checkpoints = Checkpoints(of_checkpoints, pods, migration, found, _say)
    restores = Restores(of_restores, of_checkpoints, of_pods, pods, Desk(), found, _say)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    # The loops wait in the client library, so not in the thread that has to hear of signals.
    for step, api in ((checkpoints.step, of_checkpoints), (restores.step, of_restores)):
        threading.Thread(target=_loop, args=(step, api, found, over), daemon=True).start()
    threading.Thread(target=_attend, args=(restores, over), daemon=True).start()
    over.wait()
    checkpoints.stop()


def _loop(
    step: Callable[[], str], api: Api, found: settings.Settings, over: threading.Event
) -> None:
    pause = 0.5
    while not over.is_set():
        try:
            version = step()
            api.wait(version, max(1.0, found.lease_seconds / 6))
            pause = 0.5
        except ApiError as error:
            _say(f"{error}; asked again in {pause:g} s")
            over.wait(pause)
            pause = min(2 * pause, 15)
        except Exception as error:
            _say(f"a mistake in the agent: {type(error).__name__}: {error}")
            over.wait(5)
        over.wait(0.2)  # several changes are looked at together


def _attend(restores: Restores, over: threading.Event) -> None:
    while not over.wait(ATTEND_SECONDS):
        try:
            restores.attend()
        except Exception as error:
            _say(f"a mistake in the agent: {type(error).__name__}: {error}")
            over.wait(5)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
