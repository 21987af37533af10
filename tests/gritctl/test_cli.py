"""gritctl's own manners: exit statuses, help, and what happens where it is wrong itself."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from shim.gritctl import cli, stored

DOCS = Path(__file__).resolve().parents[2] / "docs/gritctl.md"


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gritctl", *words])
    return cli.main()


def test_a_mistyped_command_is_guessed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "chekpoint") == cli.USAGE
    assert "Did you mean 'checkpoint'?" in capsys.readouterr().err
    assert run(monkeypatch, "ls", "--jsn") == cli.USAGE
    assert "--json" in capsys.readouterr().err


def test_a_mistake_of_its_own_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(place: str) -> list[str]:
        raise KeyError("oops")

    monkeypatch.setattr(stored, "find", broken)
    assert run(monkeypatch, "ls", "/tmp") == cli.FAILED
    (line,) = capsys.readouterr().err.splitlines()
    assert "a mistake in gritctl; GRITCTL_DEBUG=1 shows where" in line
    monkeypatch.setenv("GRITCTL_DEBUG", "1")
    with pytest.raises(KeyError):
        run(monkeypatch, "ls", "/tmp")


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(place: str) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(stored, "find", interrupted)
    assert run(monkeypatch, "ls", "/tmp") == cli.INTERRUPTED


def test_the_documentation_has_a_section_for_each_command() -> None:
    titles = " ".join(re.findall(r"^## (.*)$", DOCS.read_text(), re.M))
    for command in cli.COMMANDS:
        assert f"gritctl {command}" in titles
