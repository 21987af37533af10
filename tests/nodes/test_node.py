"""Nodes come up, are apart from this host, tell what is in them, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nodes.image import build_image, reference
from tests.nodes.installed import REPOSITORY
from tests.nodes.node import CgroupVersion, Node, NodeError, Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE = reference("local/busybox", "1")
HOST_HAS_V1 = any(
    line.split(":")[1].strip() for line in Path("/proc/self/cgroup").read_text().splitlines()
)
both_cgroups = pytest.mark.parametrize(
    "cgroup",
    [
        pytest.param("v1", marks=pytest.mark.skipif(not HOST_HAS_V1, reason="host is pure v2")),
        "v2",
    ],
)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node("13") as node:
        yield node


def until(true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)


def left_on_host(identity: str) -> list[str]:
    """What this host still has of a node: processes, mounts and cgroups with its name."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    found = [line for line in mounts if identity in line]
    for line in mounts:
        if line.split(" - ")[1].startswith("cgroup"):
            cgroup = Path(line.split()[4], identity)
            found += [str(cgroup)] if cgroup.exists() else []
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if identity in command.read_text():
                found.append(str(command))
        except OSError:
            continue
    return found


def test_a_command_that_fails_is_an_error_with_its_output(node: Node) -> None:
    with pytest.raises(NodeError, match=r"(?s)exit 3.*said so"):
        node.run(["sh", "-c", "echo said so >&2; exit 3"])
    assert node.run(["sh", "-c", "exit 3"], check=False).returncode == 3


def test_a_command_that_takes_too_long_is_killed(node: Node) -> None:
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        node.run(["sh", "-c", "echo begun; exec sleep 1000"], timeout=0.5)
    assert str(caught.value.stdout) == "begun\n"
    until(lambda: not node.pids("sleep"), "the command's end")


def test_input_environment_and_directory_reach_the_command(node: Node) -> None:
    os.environ["GRIT_TEST_OF_HOST"] = "1"
    shell = 'cat; pwd; echo "$WORD${GRIT_TEST_OF_HOST:-}"'
    done = node.run(["sh", "-c", shell], input="in\n", env={"WORD": "word"}, cwd="/etc")
    assert done.stdout == "in\n/etc\nword\n"


def test_the_host_s_number_of_a_process(node: Node) -> None:
    process = node.popen(["sleep", "1000"])
    until(lambda: bool(node.pids("sleep")), "sleep")
    (pid,) = node.pids("sleep")
    assert Path(f"/proc/{node.host_pid(pid)}/cmdline").read_bytes() == b"sleep\x001000\x00"
    process.kill()
    process.wait()

    def reaped() -> bool:  # by the node's own process 1
        try:
            node.host_pid(pid)
        except ProcessLookupError:
            return True
        return False

    until(reaped, "the end of sleep")


def test_a_node_has_its_own_network_and_run_directory(node: Node) -> None:
    links = node.run(["ip", "-brief", "link"]).stdout.splitlines()
    assert [line.split()[0] for line in links] == ["lo"]
    node.path("/run/containerd").mkdir()
    node.path("/run/containerd/mark").touch()
    assert not Path("/run/containerd/mark").exists()


@both_cgroups
def test_leaks_names_what_is_left(cgroup: CgroupVersion) -> None:
    with Node("13", cgroup=cgroup) as node:
        node.path("/run/containerd/s").mkdir(parents=True)
        before = node.leaks()
        assert not before - before
        process = node.popen(["sleep", "1000"])
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(node.path("/run/containerd/s/left")))
        node.run(["busybox", "mount", "-t", "tmpfs", "left", "/mnt"])
        node.path("/run/containerd/grit/left").mkdir(parents=True)
        tree = "freezer/" if cgroup == "v1" else ""
        node.path(f"/sys/fs/cgroup/{tree}default/left").mkdir(parents=True)
        until(lambda: bool(node.pids("sleep")), "sleep")
        (pid,) = node.pids("sleep")
        assert node.leaks() - before == Snapshot(
            processes=frozenset({f"{pid} sleep 1000"}),
            mounts=frozenset({"/mnt"}),
            sockets=frozenset({"s/left"}),
            directories=frozenset({"grit/left"}),
            cgroups=frozenset({f"{tree}default/left"}),
        )
    process.wait()


@both_cgroups
def test_nothing_is_left_of_a_node_with_a_frozen_container(cgroup: CgroupVersion) -> None:
    with Node("13", cgroup=cgroup) as node:
        node.start_containerd()
        node.import_image(build_image("local/busybox", "1", {}))
        node.run_container("frozen", IMAGE, "/bin/sleep", "1000")
        node.ctr("task", "pause", "frozen")
        assert left_on_host(node.identity)
    assert not left_on_host(node.identity)


def test_nothing_is_left_when_the_test_is_killed() -> None:
    script = (
        "import sys, time\nfrom tests.nodes.node import Node\n"
        "node = Node('13'); node.start(); print(node.identity, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        identity = owner.stdout.readline().strip()
        assert left_on_host(identity)
        owner.send_signal(signal.SIGKILL)
    until(lambda: not left_on_host(identity), f"the end of {identity}")


def test_containerd_stops_is_killed_and_starts_again(node: Node) -> None:
    for end in (node.stop_containerd, node.kill_containerd):
        node.start_containerd()
        assert node.pids("containerd")
        end()
        assert not node.pids("containerd")
    assert "containerd successfully booted" in node.containerd_log()


@both_cgroups
@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
@pytest.mark.parametrize("name", ["13", "forky"])
def test_the_stock_shim_checkpoints_and_restores(
    name: str, snapshotter: str, cgroup: CgroupVersion
) -> None:
    """The ground the end-to-end tests stand on: runc, CRIU and the kernel are able to."""
    # From a random start, so that a container begun afresh would not be taken for this one.
    count = (
        "i=$((0x$(head -c 7 /proc/sys/kernel/random/uuid)));"
        "while true; do i=$((i+1)); echo $i > /count; sleep 0.02; done"
    )
    with Node(name, cgroup=cgroup) as node:
        node.start_containerd()
        node.import_image(build_image("local/busybox", "1", {}), snapshotter)

        def counted(container: str) -> int:
            argv = ["task", "exec", "--exec-id", "count", container, "/bin/cat", "/count"]
            return int(node.ctr(*argv, check=False).stdout.strip() or 0)

        flags = ["--detach", "--snapshotter", snapshotter]
        node.run_container("one", IMAGE, "/bin/sh", "-c", count, flags=flags)
        until(lambda: counted("one") > 0, "the counter")
        node.ctr("container", "checkpoint", "--rw", "--task", "one", "saved:1")
        reached = counted("one")
        node.ctr("task", "rm", "--force", "one")
        node.ctr("container", "rm", "one")

        node.ctr("container", "restore", "--live", "--rw", "two", "saved:1")
        until(lambda: reached < counted("two") < reached + 10_000, "the restored counter")
        node.ctr("task", "checkpoint", "--exit", "--image-path", "/tmp/images", "two")
        assert list(node.path("/tmp/images").glob("pages-*.img"))
        until(lambda: "STOPPED" in node.ctr("task", "ls").stdout, "the container's exit")
