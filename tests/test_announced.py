"""What a client says before a Pause, and who believes it for how long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import announced, places


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "announced"
    monkeypatch.setattr(places, "ANNOUNCED", str(path))
    return path


def test_nothing_announced() -> None:
    assert announced.directory("default", "one") == ""


def test_announced_for_as_long_as_it_is_meant(directory: Path) -> None:
    with announced.announcing("default", "one", "/images/\udcff"):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert announced.directory("default", "one") == "/images/\udcff"
        assert announced.directory("default", "one") == "/images/\udcff"  # it takes nothing away
        assert announced.directory("k8s.io", "one") == ""
        assert announced.directory("default", "two") == ""
    assert announced.directory("default", "one") == ""
    assert list(directory.iterdir()) == []


def test_links_are_followed_by_who_announces(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with announced.announcing("default", "one", str(tmp_path / "link" / "images")):
        assert announced.directory("default", "one") == str(tmp_path / "images")


def test_a_client_that_was_killed_has_announced_nothing(directory: Path) -> None:
    program = (
        "import sys; from shim import announced, places; places.ANNOUNCED = sys.argv[1]\n"
        "with announced.announcing('default', 'one', '/images'): print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as client:
        assert client.stdout
        client.stdout.readline()
        assert announced.directory("default", "one") == "/images"
        client.kill()
    assert list(directory.iterdir())
    assert announced.directory("default", "one") == ""
    assert list(directory.iterdir()) == []


def test_two_clients_at_a_time() -> None:
    with announced.announcing("default", "one", "/first"):
        with announced.announcing("default", "one", "/second"):
            assert announced.directory("default", "one") == "/second"
        assert announced.directory("default", "one") == ""


def test_who_may_not_write_there_goes_without(directory: Path) -> None:
    directory.write_text("not a directory")
    with announced.announcing("default", "one", "/images"):
        assert announced.directory("default", "one") == ""


def test_links_are_not_followed_by_the_shim(directory: Path, tmp_path: Path) -> None:
    directory.mkdir()
    os.symlink(tmp_path / "elsewhere", directory / "default,one")
    assert announced.directory("default", "one") == ""
