"""The tables in docs/fault-matrix.md, filled from the outcomes of the tests in this directory: a
row for each fault, a column for each phase, and what came of it in the cell."""

from __future__ import annotations

from pathlib import Path

from shim import failpoint

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/fault-matrix.md"
BEGIN = "<!-- written by `make matrix` -->\n"
END = "<!-- end of what `make matrix` wrote -->\n"

COLUMNS = {"checkpoint": failpoint.CHECKPOINT, "restore": failpoint.RESTORE}

Cell = tuple[str, str, str]
"""Fault, operation, phase."""


def tables(outcomes: dict[Cell, str]) -> str:
    """What came out, cell by cell; a cell without a test is empty."""
    parts = [f"{len(outcomes)} faults were injected, each by the test of its name.\n"]
    for operation, phases in COLUMNS.items():
        faults = dict.fromkeys(fault for fault, where, _ in outcomes if where == operation)
        parts.append(f"\n| fault, in a {operation} | " + " | ".join(phases) + " |\n")
        parts.append("|---" * (len(phases) + 1) + "|\n")
        for fault in faults:
            row = [outcomes.get((fault, operation, phase), "") for phase in phases]
            parts.append(f"| {fault} | " + " | ".join(row) + " |\n")
    return "".join(parts)


def written() -> dict[Cell, str]:
    """What the document says came out before: a run of some tests leaves the others' cells."""
    found: dict[Cell, str] = {}
    operation, phases = "", []
    text = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    for line in text.splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if first.startswith("fault, in a "):
            operation, phases = first.removeprefix("fault, in a "), cells
        elif cells and not first.startswith("---"):
            known = zip(phases, cells, strict=True)
            found |= {(first, operation, phase): came for phase, came in known if came}
    return found


def write(text: str) -> None:
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    DOCUMENT.write_text(before + begin + text + end + after)
