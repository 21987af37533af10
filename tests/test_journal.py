"""The journal of a container, and what a `delete` makes of one that a killed daemon has left."""

from __future__ import annotations

import json
import os
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim import ending, group, journal
from shim.checkpoint_dir import Draft
from tests.e2e.gpu import until

if TYPE_CHECKING:
    from pathlib import Path


def container(home: str) -> Any:
    return SimpleNamespace(id="one", home=home, journal={})


def on_disk(home: Path) -> Any:
    return json.loads((home / "journal/one").read_text())


def test_facts_hold_until_they_are_noted_anew(tmp_path: Path) -> None:
    one = container(str(tmp_path))
    journal.note(one, journal.COPYING, processes=[(1, 2), (3, 4)])
    journal.note(one, journal.DUMPING, draft='/a "draft"', criu=None)
    expected = {
        "phase": "dumping",
        "processes": [[1, 2], [3, 4]],
        "draft": '/a "draft"',
        "criu": None,
    }
    assert on_disk(tmp_path) == expected
    assert journal.read(str(tmp_path)) == {"one": expected}
    assert os.listdir(tmp_path / "journal") == ["one"]


def test_closed(tmp_path: Path) -> None:
    one = container(str(tmp_path))
    journal.close(one)
    journal.note(one, journal.DUMPING, draft="/draft")
    journal.close(one)
    assert journal.read(str(tmp_path)) == {}
    journal.note(one, journal.LOCKING)
    assert on_disk(tmp_path) == {"phase": "locking"}


def test_a_full_disk_fails_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor whatever else stands where the journal is to be."""
    (tmp_path / "journal").write_text("")
    journal.note(container(str(tmp_path)), journal.LOCKING)
    assert "the journal could not be written" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "{", "[]", '"one"', "{}", '{"phase": 1}', "\xff"])
def test_damaged_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/one").write_bytes(text.encode("latin-1"))
    assert journal.read(str(tmp_path)) == {}


@pytest.fixture
def stranger() -> Any:
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    yield process
    process.kill()
    process.wait()


def test_criu_is_ended_but_nobody_who_has_its_pid_now(
    tmp_path: Path, stranger: subprocess.Popen[bytes]
) -> None:
    one = container(str(tmp_path))
    started = group.start_time(stranger.pid)
    journal.note(one, journal.DUMPING, criu=(stranger.pid, started + 1))
    ending.end(str(tmp_path))
    assert stranger.poll() is None
    assert not tmp_path.exists()
    journal.note(one, journal.DUMPING, criu=(stranger.pid, started))
    ending.end(str(tmp_path))
    assert stranger.wait(30) == -9


def test_what_lies_in_the_clear_goes_and_what_is_in_use_stays(tmp_path: Path) -> None:
    home, place = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    place.mkdir()
    anothers = Draft.plain(str(place))
    left = place / ".grit-partial-0123456789abcdef"
    left.mkdir()
    (left / "pages-1.img").write_text("a secret")
    journal.note(container(str(home)), journal.DECRYPTED, images="/saved", plain=str(left))
    ending.end(str(home))  # in a process of its own
    until("the end of what it had decrypted", lambda: not left.exists())
    assert os.listdir(anothers.path) == []


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"phase": "suspended"}, "suspended; no checkpoint was being written"),
        ({"phase": "dumping", "draft": "/d", "final": "/f"}, "written to /d nothing is kept"),
        ({"phase": "publishing", "draft": "/d", "final": "/f"}, "checkpoint /f, it is whole"),
        ({"phase": "published", "checkpoint": "/f"}, "its checkpoint /f is whole"),
        ({"phase": "restoring", "images": "/f"}, "the checkpoint /f is as it was"),
    ],
    ids=lambda value: value["phase"] if isinstance(value, dict) else "said",
)
def test_what_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], entry: dict[str, str], said: str
) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal/one").write_text(json.dumps(entry))
    ending.end(str(tmp_path))
    told = capfd.readouterr().err
    assert said in told
    assert "id=one" in told
