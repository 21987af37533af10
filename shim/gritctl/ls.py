"""`gritctl ls`: the checkpoints below a directory."""

from __future__ import annotations

import click

from shim.gritctl import output, stored


@click.command("ls", short_help="list checkpoints")
@click.argument("place", type=click.Path(), default=stored.PLACE)
@output.json_option
def command(place: str, as_json: bool) -> int:
    """List the checkpoints in PLACE and the directories below it (PLACE is
    /var/lib/checkpoints if not given).

    \b
    Examples:
      gritctl ls
      gritctl ls /mnt/checkpoints
      gritctl ls --json | jq -r '.[] | select(.engine == "driver") | .path'
    """
    found = [one for path in stored.find(place) for one in stored.open_all(path)]
    rows = [_row(one) for one in found]
    if as_json:
        output.print_json(rows)
    elif not rows:
        print(f"no checkpoints below {place}")
    else:
        head = ("CHECKPOINT", "CONTAINER", "CREATED", "ENGINE", "SIZE")
        lines = [
            (r["path"], r["container"], r["created"], r["engine"], output.size(r["bytes"]))
            for r in rows
        ]
        print(output.table([head, *lines], right=[4]))
    return 0


def _row(one: stored.Stored) -> dict[str, Any]:
    manifest = one.manifest
    without = f"({one.writer()}'s)" if one.foreign else "(broken)"
    return {
        "path": one.directory,
        "container": one.container,
        "namespace": manifest.namespace if manifest else "",
        "image": one.image,
        "created": manifest.created if manifest else "",
        "engine": manifest.engine if manifest else without,
        "bytes": one.bytes(),
        "problem": one.manifest_error,
    }


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
