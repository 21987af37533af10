"""Failpoints: nothing without their directory, each action, and a place that is held."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shim import failpoint

SHIM = Path(failpoint.__file__).parent


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(failpoint, "_DIRECTORY", str(tmp_path))
    return tmp_path


def test_off_unless_asked_for() -> None:
    assert failpoint._DIRECTORY == ""
    failpoint.reach("lock")


def test_a_place_that_nobody_named(directory: Path) -> None:
    failpoint.reach("lock")


@pytest.mark.parametrize(
    ("action", "raised"),
    [("", None), ("go", None), ("raise", failpoint.Reached), ("ENOSPC", OSError)],
)
def test_each_action_once(directory: Path, action: str, raised: type[Exception] | None) -> None:
    (directory / "lock").write_text(action)
    if raised is None:
        failpoint.reach("lock")
    else:
        with pytest.raises(raised) as info:
            failpoint.reach("lock")
        assert getattr(info.value, "errno", errno.ENOSPC) == errno.ENOSPC
    failpoint.reach("lock")


def test_killed(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("kill")
    program = "from shim import failpoint; failpoint.reach('lock')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "GRIT_FAILPOINTS": str(tmp_path)},
        check=False,
        cwd=SHIM.parent,
    )
    assert done.returncode == -9


def test_held(directory: Path) -> None:
    fifo = directory / "lock"
    os.mkfifo(fifo)
    went_on = threading.Event()

    def daemon() -> None:
        failpoint.reach("lock")
        went_on.set()

    thread = threading.Thread(target=daemon)
    thread.start()
    assert int(fifo.read_text()) == os.getpid()
    assert not went_on.is_set()
    fifo.write_text("go")
    thread.join(30)
    assert went_on.is_set()
    assert not fifo.exists()


def test_every_name_is_reached_in_one_place() -> None:
    sources = "".join(path.read_text() for path in SHIM.glob("*.py"))
    reached = re.findall(r'failpoint\.reach\("(.*?)"\)', sources)
    assert sorted(reached) == sorted(failpoint.CHECKPOINT + failpoint.RESTORE)
