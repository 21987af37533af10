"""`gritctl rm`: removes checkpoints."""

from __future__ import annotations

import click

from shim import checkpoint_dir


@click.command("rm", short_help="remove checkpoints")
@click.argument("directories", metavar="DIR...", type=click.Path(), nargs=-1, required=True)
def command(directories: tuple[str, ...]) -> int:
    """Remove the checkpoints in DIR..., damaged or whole. Nothing else: a directory that holds
    anything that is no part of a checkpoint is refused, and left as it is.

    \b
    Examples:
      gritctl rm /var/lib/checkpoints/job
      gritctl rm /var/lib/checkpoints/job-*
    """
    for directory in directories:
        checkpoint_dir.remove(directory)
        print(f"removed {directory}")
    return 0
