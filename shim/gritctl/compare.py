"""`gritctl compare`: checkpoints side by side, as a picture: bytes by kind, seconds by phase."""

from __future__ import annotations

import os

import click
from rich.text import Text

from shim import checkpoint_dir
from shim.gritctl import output, picture, stored
from shim.gritctl.show import memory

_NAMES = {"device": "GPU memory", "file": "changed pages of files"}
_ORDER = ("GPU memory", "anonymous", "heap", "stack", "changed pages of files", "shared")
_WIDE = 40


@click.command("compare", short_help="checkpoints side by side, as a picture")
@click.argument("directories", metavar="DIR...", type=click.Path(), nargs=-1, required=True)
@click.option("--plot", "file", metavar="FILE", help="Write the picture there, as SVG.")
@output.json_option
def command(directories: tuple[str, ...], file: str | None, as_json: bool) -> int:
    """Show where the bytes and the seconds of checkpoints went, side by side on one scale.

    \b
    Examples:
      gritctl compare /var/lib/checkpoints/job /var/lib/checkpoints/job-1
      gritctl compare --plot jobs.svg /var/lib/checkpoints/job-*
    """
    found = bars(list(directories))
    if file:
        write(file, found)
    if as_json:
        output.print_json(
            [{"label": one.label, "bytes": one.sizes, "seconds": one.seconds} for one in found]
        )
        return 0
    console = output.console()
    longest = max((sum(one.sizes.values()) for one in found), default=0) or 1
    slowest = max((sum(one.seconds.values()) for one in found), default=0) or 1
    for one in found:
        console.print(Text(one.label, "bold"))
        for kind, size in one.sizes.items():
            console.print(_line(kind, output.size(size), size / longest))
        for phase, seconds in one.seconds.items():
            console.print(_line(phase, output.seconds(seconds), seconds / slowest))
    return 0


def bars(directories: list[str]) -> list[picture.Bars]:
    """Raises NotACheckpoint; what cannot be read of a damaged one is left out of its bars."""
    found = []
    for directory in directories:
        for one in stored.open_all(directory):
            one.read_contents()
            sizes = {_NAMES.get(kind, kind): size for kind, size in memory(one).items()}
            ordered = {kind: sizes[kind] for kind in _ORDER if sizes.get(kind)}
            diff = checkpoint_dir.rootfs_diff(one.images)
            if diff:
                ordered["root file system"] = os.path.getsize(diff)
            label = os.path.relpath(one.directory, os.path.dirname(os.path.abspath(directory)))
            phases = {k: float(v) for k, v in one.manifest.phases.items()} if one.manifest else {}
            found.append(picture.Bars(label, ordered, phases))
    return found


def write(file: str, found: list[picture.Bars]) -> None:
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(picture.svg(found))
    click.echo(f"wrote {file}", err=True)


def _line(label: str, amount: str, share: float) -> Text:
    text = Text(f"  {label:24}{amount:>12}  ")
    return text.append("█" * max(1, round(_WIDE * share)), "blue")
