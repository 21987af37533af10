"""The command line, as containerd 1.6 to 2.1 use it, and as nobody should."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shim.cli import main
from shim.invocation import Invocation, UsageError


def test_containerds_start_call() -> None:
    argv = ["-namespace", "default", "-address", "/run/containerd/containerd.sock"]
    argv += ["-publish-binary", "/usr/bin/containerd", "-id", "one", "-debug", "start"]
    call = Invocation(argv)
    assert call.action == "start"
    assert call.argv == argv
    assert (call.get("namespace"), call.get("id"), call.on("debug")) == ("default", "one", True)


@pytest.mark.parametrize(
    "argv", [["-id=one", "delete"], ["--id", "one", "delete"], ["--id=one", "delete"]]
)
def test_flags_in_each_of_gos_forms(argv: list[str]) -> None:
    call = Invocation(argv)
    assert (call.get("id"), call.action) == ("one", "delete")


def test_a_switch_can_be_switched_off() -> None:
    assert not Invocation(["-debug=false", "start"]).on("debug")


@pytest.mark.parametrize("argv", [["-nonsense"], ["-id"]])
def test_a_line_no_containerd_would_send(argv: list[str]) -> None:
    with pytest.raises(UsageError):
        Invocation(argv)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["-id", "one", "start"], "namespace cannot be empty"),
        (["-namespace", "x", "dance"], "no such action: 'dance'"),
    ],
)
def test_failures_are_one_line_on_standard_error(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert words in said.err and said.err.count("\n") == 1


def test_start_and_delete_import_nothing_heavy() -> None:
    heavy = {
        "asyncio",
        "logging",
        "dataclasses",
        "inspect",
        "subprocess",
        "typing",
        "enum",
        "json",
        "hashlib" if sys.version_info >= (3, 12) else "hmac",
        "cffi",
        "google",
    }
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import shim.start, shim.delete, shim.serve; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, "."], check=True, capture_output=True, text=True
    )
    assert not heavy & set(done.stdout.split())
