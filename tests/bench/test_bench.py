"""`make bench` runs and prints what it promises, on containerd 1.7 and 2.1. The figures themselves
are for reading."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.bench.__main__ import FIGURES
from tests.nodes.installed import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["13", "forky"])
def test_bench(name: str, tmp_path: Path) -> None:
    out = tmp_path / "samples.json"
    argv = [sys.executable, "-m", "tests.bench", "--node", name, "--json", str(out)]
    argv += ["--rounds", "1", "--calls", "20"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for title in FIGURES.values():
        assert title in done.stdout
    assert done.stdout.count("aim: at most") == 3
    samples = json.loads(out.read_text())["samples"]
    assert all(samples[figure]["grit"] and samples[figure]["stock"] for figure in FIGURES)
