"""The binary as containerd calls it, and as a person might: answers, exit statuses, and errors
that say what is wrong and leave nothing behind."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from shim import __version__, messages
from shim.protowire import Message, uint32
from tests.e2e.gpu import CONFIG, configure
from tests.e2e.plain.sides import Side, nothing_left
from tests.nodes.installed import SHIM

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node

STOCK = "/usr/bin/containerd-shim-runc-v2"
DIRECTORY = "/run/somewhere"


def call(node: Node, binary: str, *words: str, stdin: bytes = b"") -> tuple[int, bytes, str]:
    """Exit status, standard output, standard error of a call as containerd would make it."""
    pipe = subprocess.PIPE
    node.path(DIRECTORY).mkdir(exist_ok=True)
    process = node.popen(
        [binary, *words], cwd=DIRECTORY, stdin=pipe, stdout=pipe, stderr=pipe, text=False
    )
    stdout, stderr = process.communicate(stdin, 30)
    return process.returncode, stdout, stderr.decode()


def start(id: str) -> list[str]:
    here = ["-address", "/run/containerd/containerd.sock", "-publish-binary", "/usr/bin/containerd"]
    return ["-namespace", "default", *here, "-id", id, "start"]


def test_version_help_and_what_is_not_understood(node: Node) -> None:
    assert call(node, SHIM, "-v")[0] == 0
    assert __version__ in call(node, SHIM, "-v")[1].decode()
    for words in (
        ["-h"],
        ["-bogus", "start"],
        ["-namespace"],
        ["start"],
        ["-namespace", "default", "-id", "x", "bogus"],
        start("x"),
    ):
        status, _, said = call(node, SHIM, *words)
        assert status == call(node, STOCK, *words)[0], words
        assert "Traceback" not in said
    assert "-bogus" in call(node, SHIM, "-bogus", "start")[2]
    assert "namespace" in call(node, SHIM, "start")[2]


def test_every_flag_of_the_stock_shim_is_known(node: Node) -> None:
    usage = call(node, STOCK, "-h")[2].splitlines()
    flags = [line.split()[0] for line in usage if line.startswith("  -")]
    assert len(flags) > 5
    for flag in flags:
        assert "not defined" not in call(node, SHIM, flag, "true", "bogus")[2], flag


def test_info(node: Node) -> None:
    """containerd asks for it since 2.0; shims before that do not know the flag."""
    runc = messages.Any(
        type_url=messages.RUNC_OPTIONS, value=messages.RuncOptions(binary_name="runc").encode()
    )
    ours = messages.RuntimeOptions(
        type_url=messages.RUNC_OPTIONS, config_body=b'BinaryName = "runc"\n'
    )
    theirs = messages.Any(type_url=messages.RUNTIME_OPTIONS, value=ours.encode())
    expected = call(node, STOCK, "-info", stdin=runc.encode())
    assert (expected[0] == 0) == (node.containerd_version >= (2, 0))
    assert call(node, SHIM, "-info", stdin=runc.encode()) == expected
    assert call(node, SHIM, "-info", stdin=theirs.encode()) == expected
    if expected[0] == 0:
        assert call(node, STOCK, "-info", stdin=theirs.encode()) != expected


class DeleteResponse(Message):
    """Without its third field, the time."""

    pid: int = uint32(1)
    exit_status: int = uint32(2)


def test_delete_of_what_is_not_there(node: Node) -> None:
    words = ["-namespace", "default", "-id", "gone", "-bundle", "/no/such/bundle", "delete"]
    before = node.leaks()
    expected = call(node, STOCK, *words)
    for _ in range(2):
        status, answer, _ = call(node, SHIM, *words)
        theirs, ours = DeleteResponse.decode(expected[1]), DeleteResponse.decode(answer)
        assert (status, ours.pid, ours.exit_status) == (
            expected[0],
            theirs.pid,
            theirs.exit_status,
        )
    nothing_left(node, before)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"annotations": 7}'])
def test_start_in_a_broken_bundle(node: Node, text: str) -> None:
    before = node.leaks()
    config = node.path(DIRECTORY) / "config.json"
    config.parent.mkdir(exist_ok=True)
    config.write_text(text)
    try:
        status, answer, said = call(node, SHIM, *start("broken"))
        assert (status, answer) == (1, b"")
        assert f"{DIRECTORY}/config.json" in said
        assert "Traceback" not in said
    finally:
        config.unlink()
    nothing_left(node, before)


@pytest.fixture
def side(node: Node) -> Iterator[Side]:
    """A container of ours that is not to come up; nothing of it may stay."""
    before = node.leaks()
    side = Side(node, "grit")
    yield side
    side.end()
    nothing_left(node, before)


def test_a_wrong_configuration(side: Side) -> None:
    configure(side.node, engine="driver", engnie="plugin")
    try:
        status, _, said = side.run("true", flags=["--rm"])
        assert status != 0
        assert "engnie" in said
        assert f"{CONFIG}, line 4" in said
    finally:
        configure(side.node)
    assert side.run("true", flags=["--rm"]) == (0, "", "")


def test_a_node_without_the_stock_shim(side: Side) -> None:
    binary = side.node.path(STOCK)
    binary.rename(f"{binary}.away")
    try:
        status, _, said = side.run("true", flags=["--rm"])
        assert status != 0
        assert "containerd-shim-runc-v2 not found" in said
        assert "Traceback" not in said
    finally:
        binary.with_name(f"{binary.name}.away").rename(binary)
    assert side.run("true", flags=["--rm"]) == (0, "", "")
