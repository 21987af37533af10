"""How gritctl prints: sizes and times for people, JSON for programs, tables of plain columns."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

json_option: Callable[..., Any] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, for programs."
)


def console(*, stderr: bool = False) -> Console:
    """Where to print. Not on a terminal: no colours, and lines as long as they are."""
    found = Console(stderr=stderr, highlight=False, emoji=False, markup=False, soft_wrap=True)
    return found


def print_json(value: object) -> None:
    json.dump(value, sys.stdout, indent=2)
    print()


def size(number: int | float) -> str:
    """12345678 -> "11.8 MiB"."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def seconds(number: float) -> str:
    """0.0123 -> "12 ms"; 83.2 -> "1 min 23 s"."""
    if number < 1:
        return f"{number * 1000:.0f} ms"
    if number < 60:
        return f"{number:.1f} s"
    return f"{number // 60:.0f} min {number % 60:.0f} s"


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Lines of columns two spaces apart; the columns numbered in `right` are set to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def compact_json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
