"""The helper has no capability that no driver call needs, and nothing it starts gets one back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.cuda import privileges
from shim.cuda.driver import Driver
from tests.cuda.simulated import Workload

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="has no capabilities to drop")

SYS_PTRACE = 19
NEEDLESS = sum(1 << number for number in privileges.NEEDLESS.values())


def capabilities(status: str) -> dict[str, int]:
    lines = dict(line.split(":\t", 1) for line in status.splitlines())
    found = {key: int(lines[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapInh")}
    return {**found, "NoNewPrivs": int(lines["NoNewPrivs"])}


MINE = capabilities(Path("/proc/self/status").read_text())


def test_the_helper_drops_them_and_does_its_work(
    driver: Driver, workload: Callable[..., Workload]
) -> None:
    one = workload()
    answer = driver.call("state", one.pid, timeout=60)
    assert answer.ok
    (helper,) = driver._helpers.values()
    found = capabilities(Path(f"/proc/{helper.pid}/status").read_text())
    assert found["NoNewPrivs"] == 1
    for key in ("CapEff", "CapPrm", "CapBnd"):
        assert found[key] == MINE[key] & ~NEEDLESS, key
        assert found[key] >> SYS_PTRACE & 1


def test_what_it_starts_gets_none_back() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os; from shim.cuda import privileges; privileges.drop(); "
            "os.execv('/bin/cat', ['cat', '/proc/self/status'])",
        ],
        cwd=Path(privileges.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    found = capabilities(done.stdout)
    assert found["CapEff"] == MINE["CapBnd"] & ~NEEDLESS
    assert found["NoNewPrivs"] == 1
