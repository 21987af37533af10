"""`gritctl prune`: removes old checkpoints by rule, and what interrupted ones have left."""

from __future__ import annotations

import datetime
import os
import shutil

import click

from shim import checkpoint_dir
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl import output, stored

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _duration(ctx: click.Context, param: click.Parameter, text: str | None) -> int | None:
    if text is None:
        return None
    if text[:-1].isdigit() and text[-1] in _UNITS:
        return int(text[:-1]) * _UNITS[text[-1]]
    raise click.BadParameter(f"{text!r} is not a time; write 30m, 12h, 7d or 4w", ctx, param)


@click.command("prune", short_help="remove old checkpoints, keeping some")
@click.argument("place", type=click.Path(), default=stored.PLACE)
@click.option(
    "--keep-last", type=click.IntRange(0), metavar="N", help="Keep the N newest of each container."
)
@click.option(
    "--keep-within",
    callback=_duration,
    metavar="TIME",
    help="Keep those made within TIME: 30m, 12h, 7d, 4w.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@output.json_option
def command(
    place: str, keep_last: int | None, keep_within: int | None, dry_run: bool, as_json: bool
) -> int:
    """Remove the checkpoints in PLACE and below that no rule keeps, and the drafts that
    interrupted checkpoints have left behind. PLACE is /var/lib/checkpoints if not given.

    A checkpoint stays if one of the rules keeps it. Those whose age is not known (without a
    manifest, or with a broken one) stay always: remove them with `gritctl rm`.

    \b
    Examples:
      gritctl prune --keep-last 3 --dry-run
      gritctl prune --keep-last 1 --keep-within 7d /mnt/checkpoints
      gritctl prune --keep-last 0                  remove them all
    """
    if keep_last is None and keep_within is None:
        raise click.UsageError("say what to keep: --keep-last N, --keep-within TIME, or both")
    removed = []
    kept = 0
    for one in _expired(place, keep_last, keep_within):
        if one is None:
            kept += 1
            continue
        if not dry_run:
            checkpoint_dir.remove(one)
        removed.append(one)
    drafts = sorted({draft for base, _, _ in os.walk(place) for draft in _drafts(base)})
    for draft in drafts:
        if not dry_run:
            shutil.rmtree(draft)
    if as_json:
        output.print_json({"removed": removed, "drafts": drafts, "kept": kept, "dry_run": dry_run})
        return 0
    verb = "would remove" if dry_run else "removed"
    for path in removed:
        print(f"{verb} {path}")
    for path in drafts:
        print(f"{verb} the unfinished {path}")
    print(f"{kept} kept")
    return 0


def _expired(place: str, keep_last: int | None, keep_within: int | None) -> list[str | None]:
    """The paths of those to remove, and a None for each that stays."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    found: list[str | None] = []
    for path in stored.find(place):
        parts = stored.open_all(path)
        first = parts[0].manifest
        if first is None or any(part.manifest is None for part in parts):
            found.append(None)
            continue
        made = datetime.datetime.fromisoformat(first.created).timestamp()
        # A pod's next checkpoint has other container ids, but the same names.
        names = ",".join(part.name for part in parts) or first.container_id
        groups.setdefault((first.namespace, names), []).append((made, path))
    now = datetime.datetime.now().timestamp()
    for group in groups.values():
        for number, (made, path) in enumerate(sorted(group, reverse=True)):
            young = keep_within is not None and now - made <= keep_within
            stays = young or (keep_last is not None and number < keep_last)
            found.append(None if stays else path)
    return found


def _drafts(directory: str) -> list[str]:
    try:
        return checkpoint_dir.abandoned(directory)
    except (OSError, CheckpointDirError):
        return []
