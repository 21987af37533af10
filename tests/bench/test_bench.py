"""`make bench` runs and writes what it promises. The figures themselves are for reading."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from tests.bench.report import BEGIN, END, FIGURES, PAGE, PLOT, RESULTS
from tests.nodes.installed import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

SHORT = ["--rounds", "1", "--calls", "20", "--dumps", "1", "--sizes", "0.02", "--gpu-sizes", "0.02"]


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tests.bench", *words]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


def test_bench(tmp_path: Path) -> None:
    page = tmp_path / PAGE
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    bench("--docs", str(tmp_path), *SHORT)

    results = json.loads((tmp_path / RESULTS).read_text())
    for name in ("13", "forky"):
        samples = results["weight"][name]["samples"]
        assert all(samples[figure]["grit"] and samples[figure]["stock"] for figure in FIGURES)
    assert set(results["plain"]["0.02"]) == {"runc", "grit"}
    assert set(results["simulated_gpu"]["0.02"]) == {"stock", "grit plugin", "grit driver"}
    written = page.read_text()
    assert written.startswith(f"before\n{BEGIN}\n") and written.endswith(f"{END}\nafter\n")
    assert "old" not in written
    assert all(title in written for title in FIGURES.values())
    plot = (tmp_path / PLOT).read_text()
    assert len(ElementTree.fromstring(plot).findall("{*}g")) == 4

    # and the same again from the results alone
    bench("--docs", str(tmp_path), "--from", str(tmp_path / RESULTS))
    assert (page.read_text(), (tmp_path / PLOT).read_text()) == (written, plot)
