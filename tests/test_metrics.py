"""The node's counters: what Prometheus' own parser makes of the file, many writers at once, and
that nothing about it can fail a task."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shim import metrics

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(directory: Path) -> Samples:
    found: Samples = {}
    for family in text_string_to_metric_families((directory / metrics.FILE).read_text()):
        assert family.type in ("counter", "histogram") and family.documentation
        for one in family.samples:
            found[one.name, tuple(sorted(one.labels.items()))] = one.value
    return found


def record(directory: Path, seconds: float = 2.0, result: str = "ok") -> None:
    phases = {"dump": seconds / 2, "checksums": 0.004}
    metrics.record(str(directory), "checkpoint", result, seconds, phases, {"image": 1 << 33})


def test_operations_add_up(tmp_path: Path) -> None:
    record(tmp_path)
    record(tmp_path, 200.0)
    record(tmp_path, 0.1, "failed")
    found = samples(tmp_path)
    assert found["grit_operations_total", (("operation", "checkpoint"), ("result", "ok"))] == 2
    assert found["grit_operations_total", (("operation", "checkpoint"), ("result", "failed"))] == 1
    assert found["grit_image_bytes_total", ()] == 3 * (1 << 33)
    assert found["grit_phase_seconds_sum", (("phase", "dump"),)] == pytest.approx(101.05)
    buckets = [
        found["grit_phase_seconds_bucket", (("le", le), ("phase", "dump"))]
        for le in ("0.01", "0.05", "1", "60", "120", "600", "+Inf")
    ]
    assert buckets == [0, 1, 2, 2, 3, 3, 3]
    assert found["grit_phase_seconds_count", (("phase", "dump"),)] == 3
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".grit.prom.lock", "grit.prom"]
    assert (tmp_path / "grit.prom").stat().st_mode & 0o777 == 0o644


def test_many_shims_at_once(tmp_path: Path) -> None:
    program = (
        "import sys; from shim import metrics\n"
        "for _ in range(20): metrics.record(sys.argv[1], 'resume', 'ok', 0.1, {}, {})"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    shims = [subprocess.Popen(words) for _ in range(4)]
    assert [shim.wait(60) for shim in shims] == [0] * 4
    found = samples(tmp_path)
    assert found["grit_operations_total", (("operation", "resume"), ("result", "ok"))] == 80


def test_nothing_fails_a_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path / "missing")
    assert "an operation was not counted" in capfd.readouterr().err
    (tmp_path / metrics.FILE).write_text("something else\n")
    record(tmp_path)
    assert "begun anew" in capfd.readouterr().err
    monkeypatch.setattr(metrics, "_WAIT_SECONDS", 0.05)
    held = os.open(tmp_path / f".{metrics.FILE}.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    before = (tmp_path / metrics.FILE).read_text()
    record(tmp_path)
    assert "is locked by others" in capfd.readouterr().err
    assert (tmp_path / metrics.FILE).read_text() == before
    os.close(held)
