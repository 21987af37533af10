"""`gritctl checkpoint`: a container or a pod, saved whole into a directory."""

from __future__ import annotations

import os
import time

import click

from shim.gritctl import containerd, output, progress, saving, stored, targets
from shim.gritctl.cli import FAILED, INTERRUPTED
from shim.gritctl.interrupts import Interrupted, Interrupts


@click.command("checkpoint", short_help="save a container or a pod into a directory")
@click.argument("name", metavar="CONTAINER|POD", shell_complete=containerd.complete)
@click.option(
    "--to",
    "directory",
    metavar="DIR",
    type=click.Path(),
    required=True,
    help="Where to; must not exist, or be empty.",
)
@click.option(
    "--leave-running/--exit",
    default=True,
    show_default="--leave-running",
    help="What becomes of it afterwards.",
)
@containerd.options
@output.json_option
def command(
    name: str, directory: str, leave_running: bool, namespace: str, address: str, as_json: bool
) -> int:
    """Save a running container into DIR: its memory, its GPU memory, what it has changed in its
    root file system, its log and its description. A pod's name, or its sandbox's id, saves all its
    containers at one instant.

    DIR appears when everything is in it and on the disk. Whatever fails before, and Ctrl-C, leaves
    no DIR and the workload running.

    \b
    Examples:
      gritctl checkpoint job --to /var/lib/checkpoints/job
      gritctl checkpoint --json job --to /var/lib/checkpoints/job-2 > events
      gritctl checkpoint -n k8s.io trainer-0 --to /var/lib/checkpoints/trainer-0
      gritctl checkpoint --exit job --to /var/lib/checkpoints/job-3
    """
    with containerd.Containerd(address, namespace) as connection:
        found, pod = targets.find(connection, name)
        parent = os.path.dirname(os.path.abspath(directory))
        if parent == stored.PLACE:
            os.makedirs(parent, mode=0o700, exist_ok=True)
        display = progress.choose(as_json)
        began = time.monotonic()
        try:
            with Interrupts() as interrupts:
                saving.Saving(
                    connection,
                    found,
                    directory,
                    display,
                    interrupts,
                    pod=pod,
                    end=not leave_running,
                ).run()
        except (saving.SavingError, Interrupted) as error:
            progress.failed(display, str(error))
            return INTERRUPTED if isinstance(error, Interrupted) else FAILED
        finally:
            display.close()
    seconds = time.monotonic() - began
    size = sum(one.bytes() for one in stored.open_all(directory))
    if isinstance(display, progress.Json):
        path = os.path.abspath(directory)
        display.finished(event="done", path=path, bytes=size, seconds=round(seconds, 3))
    else:
        print(f"{directory}: {output.size(size)} in {output.seconds(seconds)}")
    return 0
