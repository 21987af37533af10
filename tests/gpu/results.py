"""What the GPU tests found, kept as it comes in: a run that is cut short has what it had.

DIRECTORY/results.jsonl has one object a line, DIRECTORY/results.md the same for people: a table
of runs and a list of findings, ready for docs/gpu.md.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.machine import ARCHIVE

if TYPE_CHECKING:
    from collections.abc import Sequence

_TITLES = {
    "date": "date (UTC)",
    "gpu": "GPU",
    "driver": "driver",
    "criu": "CRIU",
    "engine": "engine",
    "test": "run",
    "device": "device memory, GB",
    "lock": "lock",
    "copy": "copy",
    "freeze": "freeze",
    "lane_write": "lane: write",
    "lane_check": "lane: check",
    "lane_drop": "lane: drop",
    "dump": "dump",
    "checksums": "checksums",
    "lane_fill": "lane: fill",
    "thaw": "thaw",
    "restore": "restore",
    "unlock": "unlock",
    "frozen": "frozen",
    "pause": "pause",
    "rate": "copy, GB/s",
    "checkpoint": "checkpoint in all",
    "criu_restore": "CRIU restore",
    "fill_after": "lane: fill (new)",
    "restore_after": "restore (new)",
    "unlock_after": "unlock (new)",
    "restored": "restore in all",
    "files": "files",
    "bytes": "size, GB",
    "biggest": "biggest file",
}
_IN_GB = ("device", "bytes")


class Results:
    """The results of one session, in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._rows: list[dict[str, Any]] = []
        self._findings: list[str] = []

    @classmethod
    def here(cls) -> Results:
        """In $OUT, or in the tree's .gpu/results."""
        return cls(Path(os.environ.get("OUT") or ARCHIVE.with_name("results")))

    def row(self, test: str, figures: dict[str, Any]) -> None:
        """One checkpoint, perhaps with its restore; times in seconds, sizes in bytes."""
        row = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "test": test, **figures}
        self._rows.append(row)
        self._keep({"kind": "row", **row})

    def finding(self, test: str, **facts: Any) -> None:
        """What happened in a case that has no figures."""
        told = "; ".join(f"{name.replace('_', ' ')}: {fact}" for name, fact in facts.items())
        self._findings.append(f"- **{test}**: {told}")
        self._keep({"kind": "finding", "test": test, **facts})

    def transcript(self, test: str, lines: Sequence[str]) -> None:
        """What was to be seen, line by line."""
        self._findings += [f"\n**{test}**\n", "```", *lines, "```"]
        self._keep({"kind": "transcript", "test": test, "lines": lines})

    def _keep(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, default=str)
        print(line, flush=True)
        with open(self.directory / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")
        text = "\n".join([table(self._rows), "", *self._findings, ""])
        (self.directory / "results.md").write_text(text, encoding="utf-8")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    titles = list(_TITLES.values())
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for row in rows:
        lines.append(f"| {' | '.join(_shown(name, row.get(name)) for name in _TITLES)} |")
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name in _IN_GB:
        return f"{value / 1e9:.2f}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
