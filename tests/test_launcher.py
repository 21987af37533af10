"""The command that containerd starts: a shell script that becomes Python, or, for a `delete` that
has nothing else to do, the stock shim."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import group, places

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "packaging"))
import install

STOCK = "containerd-shim-runc-v2"
SPOKEN = {
    "address": "unix://{sockets}/0af",
    "bootstrap.json": '{{"version":3,"address":"unix://{sockets}/0af","protocol":"ttrpc"}}\n',
}


class Place:
    """A bundle, a group's run directory, and a containerd with a stock shim beside it."""

    def __init__(self, root: Path) -> None:
        self.sockets, self.run = f"{root}/s", f"{root}/grit"
        self.bundle, self.group = root / "bundle", root / "grit/0af"
        self.bundle.mkdir()
        self.group.mkdir(parents=True)
        (root / "bin").mkdir()
        self.containerd = root / "bin/containerd"
        self.stock = self.program(root / "bin" / STOCK, "stock")
        python = self.program(root / "python", "python")
        text = install.launcher(install.SHIM, "shim.cli", str(python), "/packages")
        for real, own in ((places.RUN, self.run), (places.SOCKETS, self.sockets)):
            assert real in text
            text = text.replace(real, own)
        self.launcher = root / "bin" / install.SHIM
        self.launcher.write_text(text)
        self.launcher.chmod(0o755)

    @staticmethod
    def program(path: Path, name: str) -> Path:
        path.write_text(f'#!/bin/sh\necho {name}\nfor word; do echo "$word"; done\n')
        path.chmod(0o755)
        return path

    def serve(self, record: str, pid: int, started: int) -> None:
        (self.bundle / record).write_text(SPOKEN[record].format(sockets=self.sockets))
        lines = f"outer 1 1\ninner 2 2\nouter {pid} {started}\n"
        (self.group / "processes").write_text(lines)

    def call(self, action: str) -> list[str]:
        """Who was run, and with what."""
        words = ["-namespace", "a b", "-publish-binary", str(self.containerd), "-id", "one", action]
        done = subprocess.run(
            [self.launcher, *words],
            cwd=self.bundle,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == ""
        who, *given = done.stdout.splitlines()
        assert given[-len(words) :] == words
        return [who, *given[: -len(words)]]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("record", SPOKEN)
def test_delete_while_the_daemon_lives_is_the_stock_one(place: Place, record: str) -> None:
    place.serve(record, os.getpid(), group.start_time(os.getpid()))
    assert place.call("delete") == ["stock"]
    assert place.call("start")[0] == "python"


def test_delete_after_the_group_has_gone_is_the_stock_one(place: Place) -> None:
    place.serve("address", 1, 1)
    (place.group / "processes").unlink()
    place.group.rmdir()
    assert place.call("delete") == ["stock"]


def test_delete_after_the_daemon_was_killed_is_ours(place: Place) -> None:
    place.serve("address", os.getpid(), group.start_time(os.getpid()) + 1)  # another's pid by now
    assert place.call("delete")[0] == "python"
    place.serve("address", 1 << 30, 1)
    assert place.call("delete")[0] == "python"
    ended = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # and not reaped
    started = Path(f"/proc/{ended.pid}/stat").read_text().rpartition(")")[2].split()[19]
    place.serve("address", ended.pid, int(started))
    assert place.call("delete")[0] == "python"
    ended.wait()


def test_delete_while_the_daemon_is_being_killed_is_ours(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has closed its sockets, and is no zombie yet."""
    pid, started = os.getpid(), group.start_time(os.getpid())
    place.serve("address", pid, started)
    alive = Path(f"/proc/{pid}/stat").read_text()
    before, _, after = alive.rpartition(") ")
    fields = after.split()
    fields[6] = str(int(fields[6]) | 4)
    proc = place.bundle.parent / "proc"
    (proc / str(pid)).mkdir(parents=True)
    place.launcher.write_text(place.launcher.read_text().replace("/proc/", f"{proc}/"))
    for stat, who in ((alive, "stock"), (f"{before}) {' '.join(fields)}\n", "python")):
        (proc / str(pid) / "stat").write_text(stat)
        assert place.call("delete")[0] == who
    assert group.living_process(str(place.group), "outer") == pid
    monkeypatch.setattr(group, "_stat", lambda pid: [field.encode() for field in fields])
    assert group.living_process(str(place.group), "outer") == 0


def test_delete_that_cannot_be_judged_is_ours(place: Place) -> None:
    assert place.call("delete")[0] == "python"  # no address
    (place.bundle / "address").write_text("unix:///run/elsewhere")
    assert place.call("delete")[0] == "python"
    place.serve("address", os.getpid(), group.start_time(os.getpid()))
    (place.group / "processes").write_text("")
    assert place.call("delete")[0] == "python"


def test_grit_under_the_stock_name_does_not_become_itself(place: Place) -> None:
    place.serve("address", os.getpid(), group.start_time(os.getpid()))
    place.stock.unlink()
    assert place.call("delete")[0] == "python"
    place.stock.symlink_to(place.launcher)
    assert place.call("delete")[0] == "python"


def test_what_python_is_given(place: Place) -> None:
    """The command as it was called is its first word (see inner.find)."""
    who, flags, option, *program, itself = place.call("start")
    assert (who, flags, option, itself) == ("python", "-ISWignore", "-c", str(place.launcher))
    assert 'sys.path.append("/packages")' in program
