"""`gritctl diff`: what differs between two checkpoints."""

from __future__ import annotations

import click

from shim.gritctl import output, stored
from shim.gritctl.show import describe

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PLAIN = (
    "container", "namespace", "image", "written_by", "created", "hostname", "kernel", "criu",
    "engine", "driver", "gpus", "options", "plugins", "needs",
)  # fmt: skip


@click.command("diff", short_help="what differs between two checkpoints")
@click.argument("first", metavar="A", type=click.Path())
@click.argument("second", metavar="B", type=click.Path())
@output.json_option
def command(first: str, second: str, as_json: bool) -> int:
    """Show what differs between the checkpoints in A and B: where and with what they were made,
    processes, memory, open files, mounts, and how long each phase took.

    \b
    Examples:
      gritctl diff /var/lib/checkpoints/job /var/lib/checkpoints/job-1
      gritctl diff --json /var/lib/checkpoints/job /var/lib/checkpoints/job-1 | jq .memory

    Exit status: 0 also where they differ.
    """
    one, other = ({c.name: c for c in stored.open_all(path)} for path in (first, second))
    if set(one) != set(other):
        raise click.UsageError(
            f"{first} and {second} hold other containers: {', '.join(one) or 'one'} and "
            f"{', '.join(other) or 'one'}"
        )
    found = {name: differences(describe(one[name]), describe(other[name])) for name in one}
    if as_json:
        output.print_json(found[""] if list(found) == [""] else found)
        return 0
    for name, difference in found.items():
        if name:
            print(f"{name}:")
        _print(difference, first, second)
    return 0


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What differs: `changed` and `memory` and `seconds` give both values, the others what only
    one of the two has."""
    changed = {key: [a.get(key), b.get(key)] for key in _PLAIN if a.get(key) != b.get(key)}
    found: dict[str, Any] = {"changed": changed}
    for key, name in (("memory", "memory"), ("phases", "seconds")):
        both = a.get(key) or {}, b.get(key) or {}
        kinds = dict.fromkeys((*both[0], *both[1]))
        found[name] = {
            kind: [both[0].get(kind, 0), both[1].get(kind, 0)]
            for kind in kinds
            if both[0].get(kind, 0) != both[1].get(kind, 0)
        }
    found["bytes"] = [a["bytes"], b["bytes"]]
    for key in ("processes", "files", "mounts"):
        lists = [sorted(_line(key, entry) for entry in side.get(key) or []) for side in (a, b)]
        found[key] = {"only_a": _without(*lists), "only_b": _without(*reversed(lists))}
    return found


def _line(key: str, entry: dict[str, Any]) -> str:
    if key == "processes":
        return f"{entry['pid']} {entry['command']}"
    if key == "files":
        return f"{entry['kind']} {entry['what']}".strip()
    return f"{entry['at']} {entry['filesystem']}" + (
        f" ({entry['external']})" * bool(entry["external"])
    )


def _without(these: list[str], those: list[str]) -> list[str]:
    """What is in the first list more often than in the second."""
    left = list(those)
    found = []
    for line in these:
        if line in left:
            left.remove(line)
        else:
            found.append(line)
    return found


def _print(found: dict[str, Any], first: str, second: str) -> None:
    rows = [("", "A", "B")]
    for key, (a, b) in found["changed"].items():
        if isinstance(a, list) or isinstance(b, list):
            rows += [(key, str(x), "-") for x in a or [] if x not in (b or [])]
            rows += [(key, "-", str(x)) for x in b or [] if x not in (a or [])]
        else:
            rows.append((key, _shown(a), _shown(b)))
    for kind, (a, b) in found["memory"].items():
        rows.append((f"memory, {kind}", output.size(a), f"{output.size(b)} ({_signed(b - a)})"))
    for phase, (a, b) in found["seconds"].items():
        rows.append((f"time, {phase}", output.seconds(a), output.seconds(b)))
    if found["bytes"][0] != found["bytes"][1]:
        a, b = found["bytes"]
        rows.append(("size", output.size(a), f"{output.size(b)} ({_signed(b - a)})"))
    print(f"A {first}\nB {second}")
    if len(rows) > 1:
        print(output.table(rows))
    for key in ("processes", "files", "mounts"):
        for side, sign in (("only_a", "-"), ("only_b", "+")):
            for line in found[key][side]:
                print(f"{sign} {key}: {line}")
    if len(rows) == 1 and not any(
        any(found[key].values()) for key in ("processes", "files", "mounts")
    ):
        print("no difference but in the pages themselves, if there is one")


def _shown(value: object) -> str:
    return "-" if value in (None, "") else str(value)


def _signed(number: int) -> str:
    return ("+" if number >= 0 else "-") + output.size(abs(number))
