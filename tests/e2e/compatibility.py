"""The table of clients in docs/compatibility.md, filled from the outcomes of tests marked `cell`:
`make table` writes it, and a run of all those tests holds it against what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/compatibility.md"
BEGIN = "<!-- written by `make table` -->\n"
END = "<!-- end of what `make table` wrote -->\n"

_CONTAINERDS = {"1.6": "1.6", "13": "1.7", "forky": "2.1"}
_NAMES = {
    "grit": "grit.v1",
    "io.containerd.grit.v1": "grit.v1",
    "grit-as-runc": "runc.v2",
    "io.containerd.runc.v2": "runc.v2",
}

Cell = tuple[str, str, str, str]
"""Client, containerd, runtime name, engine."""


def cell_of(item: pytest.Item) -> Cell | None:
    """The cell that a test fills, by its marker and its parameters."""
    marker = item.get_closest_marker("cell")
    if marker is None:
        return None
    given: dict[str, Any] = {**item.callspec.params, **marker.kwargs}  # type: ignore[attr-defined]

    def first(*names: str) -> str:
        return next(str(given[name]) for name in names if name in given)

    node = first("node", "kubelet", "gpu_node")
    name = first("handler", "runtime")
    return marker.args[0], _CONTAINERDS[node], _NAMES[name], first("engine")


def table(outcomes: dict[Cell, bool]) -> str:
    """Each cell has the engines with which its test passed."""
    versions, names = ("1.6", "1.7", "2.1"), ("grit.v1", "runc.v2")
    columns = [(version, name) for version in versions for name in names]
    lines = ["| client | " + " | ".join(f"{v}, `{n}`" for v, n in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for client in dict.fromkeys(cell[0] for cell in outcomes):
        row = []
        for version, name in columns:
            found = {e: outcomes.get((client, version, name, e)) for e in ("driver", "plugin")}
            passed = [engine for engine, passed in found.items() if passed]
            failed = [f"**not {engine}**" for engine, passed in found.items() if passed is False]
            row.append(", ".join(passed + failed) or "containerd has none")
        lines.append(f"| {client} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table in the document."""
    return DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]


def write(text: str) -> None:
    before, begin, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    DOCUMENT.write_text(before + begin + text + end + after)
