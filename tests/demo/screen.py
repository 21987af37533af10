"""What the demo prints: one line per phase, notes below it, small tables. Plain text, readable in a
terminal and in a log alike: no colour, no line is ever rewritten."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

WIDTH = 100
_INDENT = "      "


class Screen:
    """Numbers the phases and times them."""

    def __init__(self) -> None:
        self._number = 0

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """One line: the title when the phase begins, its time when it ends. Inside, print nothing
        else; what stops the phase ends the line and goes on to the caller."""
        self._number += 1
        lead = f"[{self._number:2}] {title} "
        print(lead.ljust(WIDTH - 10, "."), end="", flush=True)
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            print(" failed" if isinstance(error, Exception) else " stopped", flush=True)
            raise
        print(f" {time.monotonic() - began:6.2f} s", flush=True)

    def note(self, text: str) -> None:
        """A paragraph, indented below the phase it belongs to."""
        print(textwrap.fill(text, WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT))

    def verbatim(self, lines: Sequence[str]) -> None:
        """Lines of somebody else's output, cut to the screen's width."""
        for line in lines:
            room = WIDTH - len(_INDENT) - 2
            print(f"{_INDENT}| {line if len(line) <= room else line[: room - 3] + '...'}")

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """Columns as wide as they need to be; the first row is the head."""
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for number, row in enumerate(rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(_INDENT + "  ".join(cells).rstrip())
            if number == 0:
                print(_INDENT + "  ".join("-" * width for width in widths))
        print(flush=True)


def mebibytes(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"
