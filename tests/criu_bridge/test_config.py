"""CRIU's configuration file and environment as text; real CRIU reads them in test_real_criu."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim.criu_bridge import config


def test_ours_comes_after_the_file_it_adds_to(tmp_path: Path) -> None:
    base = tmp_path / "runc.conf"
    base.write_text("timeout 5 # their wish")
    text = config.file_text([("tcp-established", None), ("libdir", "/a b")], str(base))
    assert text == 'timeout 5 # their wish\ntcp-established\nlibdir "/a b"\n'


def test_the_file_it_adds_to_may_be_missing(tmp_path: Path) -> None:
    assert config.file_text([("file-locks", None)], str(tmp_path / "no")) == "file-locks\n"


@pytest.mark.parametrize("value", ["", "/a#b", '/a"b', "/a\nfile-locks", "/a\\b"])
def test_what_the_format_cannot_hold_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="cannot hold libdir"):
        config.file_text([("libdir", value)])


def test_no_plugin_is_in_the_directory_of_no_plugins() -> None:
    assert not [name for name in os.listdir(config.NO_PLUGINS) if name.endswith(".so")]
    assert config.environment()["CRIU_LIBS_DIR"] == config.NO_PLUGINS


def test_our_commands_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    env = config.environment(plugins="/p", commands="/ours", extra={"CRIU_FAULT": "138"})
    assert env["PATH"] == "/ours:/usr/bin"
    assert (env["CRIU_LIBS_DIR"], env["CRIU_FAULT"]) == ("/p", "138")
