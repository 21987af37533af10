"""The bridge against real CRIU, runc and containerd: containers under the stock shim, frozen by
`ctr task pause`, dumped by us, restored by the stock `runc restore`.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shim.criu_bridge import config, rpc
from tests.nodes import cuda_plugin
from tests.nodes.image import build_image, reference
from tests.nodes.node import Node

REPOSITORY = Path(__file__).parents[2]
ROOT = "/grit"  # where in_node.py looks for it
IMAGE = reference("local/criu-bridge", "1")
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.02; done"
NODES = [("13", "v2"), ("13", "v1"), ("forky", "v2"), ("forky", "v1")]

# Each CRIU, and each kind of control group, once: for what needs no pair of them in particular.
each = pytest.mark.parametrize("node", [NODES[1], NODES[2]], ids="-".join, indirect=True)
on_one = pytest.mark.parametrize("node", [NODES[2]], ids="-".join, indirect=True)


@pytest.fixture(scope="module", params=NODES, ids="-".join)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    name, cgroup = request.param
    binds = {
        f"{ROOT}/shim": REPOSITORY / "shim",
        f"{ROOT}/tests": REPOSITORY / "tests",
        "/plugins": cuda_plugin.directory(name),
    }
    with Node(name, cgroup=cgroup, binds=binds) as node:
        node.start_containerd()
        node.import_image(build_image("local/criu-bridge", "1", {}))
        yield node


class Container:
    """A container of the stock shim in a node, and what a test wants of it."""

    def __init__(self, node: Node, id: str, script: str, *flags: str) -> None:
        self.node = node
        self.id = id
        self.images = f"/var/tmp/{id}/images"
        self.work = f"/var/tmp/{id}/work"
        node.path(f"/var/tmp/{id}").mkdir(parents=True, exist_ok=True)
        # ctr takes a terminal only where it has one itself.
        ours, theirs = os.openpty()
        argv = ["ctr", "run", "--detach", "--cpu-shares", "0", *flags, IMAGE, id]
        with node.popen(
            [*argv, "/bin/sh", "-c", script], stdin=theirs, stdout=theirs, stderr=theirs
        ) as ctr:
            os.close(theirs)
            said = ctr.wait(60) and os.read(ours, 65536)
        os.close(ours)
        assert not said, said

    def file(self, path: str) -> str:
        """The content of a file in its root file system, as the node's host sees it."""
        try:
            return self.node.path(f"{BUNDLES}/{self.id}/rootfs{path}").read_text().strip()
        except FileNotFoundError:
            return ""

    def count(self) -> int:
        return int(self.file("/count") or 0)

    def status(self) -> str:
        for line in self.node.ctr("task", "ls").stdout.splitlines():
            words = line.split()
            if words[0] == self.id:
                return words[2]
        return "gone"

    def pause(self) -> None:
        self.node.ctr("task", "pause", self.id)

    def pid(self) -> int:
        state = self.node.path(f"/run/containerd/runc/default/{self.id}/state.json")
        return int(json.loads(state.read_text())["init_process_pid"])

    def dump(self, **order: Any) -> dict[str, Any]:
        order = {"id": self.id, "images": self.images, "work": self.work, **order}
        ran = self.node.run(
            ["python3", f"{ROOT}/tests/criu_bridge/in_node.py", json.dumps(order)], timeout=120
        )
        answer: dict[str, Any] = json.loads(ran.stdout)
        return answer

    def log(self) -> str:
        return self.node.path(f"{self.work}/dump.log").read_text(errors="replace")

    def forget(self) -> None:
        """What the stock `runc` knows of the dumped container goes; its bundle stays."""
        self.node.run([*RUNC, "delete", "--force", self.id])

    def restore_command(self, *flags: str) -> list[str]:
        where = ["--image-path", self.images, "--work-path", f"{self.work}-restore"]
        bundle = ["--bundle", f"{BUNDLES}/{self.id}"]
        return [*RUNC, "restore", *where, *bundle, *flags, self.id]

    def restore(self) -> None:
        """By the stock `runc restore`, with the stdio that `ctr run --null-io` had."""
        process = self.node.popen(
            self.restore_command("--detach"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        if process.wait(60):
            log = self.node.path(f"{self.work}-restore/restore.log")
            raise AssertionError(log.read_text(errors="replace")[-4000:])
        if self.node.cgroup == "v1":
            # CRIU puts back FROZEN, the state the v1 freezer had when it was dumped.
            self.node.run([*RUNC, "resume", self.id], check=False)


RUNC = ["runc", "--root", "/run/containerd/runc/default"]


@pytest.fixture
def run(node: Node, request: pytest.FixtureRequest) -> Iterator[Callable[..., Container]]:
    made: list[Container] = []

    def run(script: str = COUNT, *flags: str) -> Container:
        id = f"{request.node.originalname.replace('_', '-')[5:25].strip('-')}-{len(made)}"
        made.append(Container(node, id, script, *(flags or ("--null-io",))))
        return made[-1]

    yield run
    for container in reversed(made):
        # runc 1.3 mostly waits 10 s for the end of a frozen one, which had come long before.
        node.run([*RUNC, "resume", container.id], check=False)
        node.run([*RUNC, "delete", "--force", container.id], check=False)
        node.ctr("task", "rm", "--force", container.id, check=False)
        node.ctr("container", "rm", container.id, check=False)


def wait_until(true: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def counts_on(container: Container, beyond: int) -> None:
    wait_until(lambda: container.count() > beyond, f"the counter goes beyond {beyond}")


def stands_still(container: Container) -> int:
    """Its counter, after a time in which a running one would have gone on."""
    before = container.count()
    time.sleep(0.3)
    assert container.count() == before
    return before


@pytest.fixture
def counting(run: Callable[..., Container]) -> Container:
    container = run()
    counts_on(container, 3)
    container.pause()
    return container


def test_the_version(node: Node) -> None:
    asked = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from shim.criu_bridge import client, transport\n"
        "print(client.version(transport.Swrk()), client.check_features(transport.Swrk()))"
    )
    said = node.run(["python3", "-c", asked]).stdout
    expected = node.run(["criu", "--version"]).stdout.split()[1]
    assert said.startswith(f"({', '.join((expected + '.0').split('.')[:3])}) CriuFeatures(")


@pytest.mark.parametrize("pod", [False, True], ids=["alone", "in a pod"])
def test_our_request_is_the_one_runc_sends(
    run: Callable[..., Container], node: Node, pod: bool
) -> None:
    flags = ["--null-io", "--mount", "type=bind,src=/etc/hostname,dst=/etc/bound,options=rbind:ro"]
    # A device node is a bind mount of its own only in the eyes of CRIU.
    flags += ["--device", "/dev/full", "--annotation", "org.criu.config=/etc/criu/own.conf"]
    if node.cgroup == "v1":
        # Without a cgroup namespace runc makes one bind mount of each controller's tree.
        flags += ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro"]
    if pod:
        sandbox = run()
        flags += [f"--with-ns={k}:/proc/{sandbox.pid()}/ns/{f}" for k, f in NAMESPACES.items()]
    container = run(COUNT, *flags)
    bin = node.path("/var/tmp/listening")
    bin.mkdir(exist_ok=True)
    script = f'#!/bin/sh\nexec python3 {ROOT}/tests/criu_bridge/listening_criu.py "$@"\n'
    (bin / "criu").write_text(script)
    (bin / "criu").chmod(0o755)
    where = ["--image-path", "/var/tmp/no-images", "--work-path", "/var/tmp/no-work"]
    wishes = ["--leave-running", "--tcp-established", "--file-locks"]
    ran = node.run(
        [*RUNC, "checkpoint", *where, *wishes, container.id],
        env={"PATH": "/var/tmp/listening:/usr/sbin:/usr/bin", "REQUEST": "/var/tmp/request"},
        check=False,
    )
    assert "criu failed: type DUMP" in ran.stderr
    theirs = rpc.CriuReq.decode(node.path("/var/tmp/request").read_bytes()).opts
    asked = (
        f"import sys; sys.path.insert(0, {ROOT!r})\n"
        "from shim import runcstate\n"
        "from shim.criu_bridge import request\n"
        f"state = runcstate.load(runcstate.DEFAULT_ROOT, 'default', {container.id!r})\n"
        "options = request.DumpOptions("
        "leave_running=True, tcp_established=True, file_locks=True)\n"
        "sys.stdout.write(request.dump_options(state, options).encode().hex())"
    )
    ours = rpc.CriuOpts.decode(bytes.fromhex(node.run(["python3", "-c", asked]).stdout))
    assert theirs is not None
    # Where they write to is filled in when a dump begins.
    assert theirs.log_file == "dump.log"
    theirs.images_dir_fd = theirs.work_dir_fd = theirs.log_file = None
    if node.name == "13":
        # runc 1.1 leaves these at CRIU's defaults, which is what we say.
        assert theirs.manage_cgroups_mode is None
        theirs.manage_cgroups_mode = rpc.CG_DEFAULT
        theirs.tcp_skip_in_flight = theirs.link_remap = False
    assert ours == theirs
    assert ours.config_file == "/etc/criu/own.conf"
    assert len(ours.external) == (2 if pod else 0)
    controllers = [m.key for m in ours.ext_mnt if m.key and m.key.startswith("/sys/fs/cgroup/")]
    assert ("/sys/fs/cgroup/freezer" in controllers) is (node.cgroup == "v1")


# --- good dumps ---------------------------------------------------------------------------


def test_a_frozen_container_stays_frozen_and_goes_on_after_resume(counting: Container) -> None:
    before = stands_still(counting)
    answer = counting.dump(options={"leave_running": True})
    assert "error" not in answer
    assert (answer["before"], answer["after"]) == ("FROZEN", "FROZEN")
    assert answer["notifications"] == [
        "pre-dump",
        "network-lock",
        "query-ext-files",
        "post-dump",
        "network-unlock",
    ]
    assert answer["processes"][0] == 1
    assert answer["plugins"] == []
    assert answer["page_bytes"] >= answer["stats"] * 4096 > 0
    assert stands_still(counting) == before
    assert counting.status() == "PAUSED"
    counting.node.ctr("task", "resume", counting.id)
    counts_on(counting, before)


def test_the_stock_runc_restores_what_we_dumped(counting: Container) -> None:
    before = stands_still(counting)
    answer = counting.dump()
    assert "error" not in answer
    wait_until(lambda: counting.status() == "STOPPED", "containerd sees the exit")
    counting.forget()
    counting.restore()
    counts_on(counting, before)


@on_one
def test_the_images_and_logs_are_private(counting: Container) -> None:
    counting.dump(options={"leave_running": True})
    descriptors = counting.node.path(f"{counting.images}/descriptors.json")
    assert descriptors.stat().st_mode & 0o777 == 0o600
    assert json.loads(descriptors.read_text()) == ["/dev/null"] * 3


def test_a_running_container_is_frozen_by_criu_and_runs_on(
    run: Callable[..., Container],
) -> None:
    container = run()
    counts_on(container, 3)
    answer = container.dump(options={"leave_running": True})
    assert "error" not in answer
    assert (answer["before"], answer["after"]) == ("THAWED", "THAWED")
    counts_on(container, container.count())


def test_pipes_of_the_shim_are_replaced_by_those_of_the_restorer(
    run: Callable[..., Container],
) -> None:
    script = "i=0; while :; do i=$((i+1)); echo n$i; echo $i > /count; sleep 0.05; done"
    container = run(script, "--log-uri", "file:///var/tmp/pipes.log")
    counts_on(container, 3)
    container.pause()
    before = stands_still(container)
    assert "error" not in container.dump()
    descriptors = json.loads(
        container.node.path(f"{container.images}/descriptors.json").read_text()
    )
    assert [d.startswith("pipe:[") for d in descriptors[1:]] == [True, True]
    container.forget()
    with container.node.popen(
        container.restore_command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as restored:
        if container.node.cgroup == "v1":
            resumed = [*RUNC, "resume", container.id]
            wait_until(
                lambda: (
                    container.node.run(resumed, check=False).returncode == 0
                    or container.count() > before
                ),
                "the restored container is thawed",
            )
        counts_on(container, before)
        container.node.run([*RUNC, "kill", container.id, "KILL"])
        assert restored.stdout is not None
        lines = restored.stdout.read().split()
    assert int(lines[0][1:]) in (before, before + 1)


def test_bind_mounts_and_masked_files(run: Callable[..., Container], node: Node) -> None:
    data = node.path("/var/tmp/bind")
    data.mkdir(exist_ok=True)
    (data / "one").write_text("first")
    mount = "type=bind,src=/var/tmp/bind,dst=/srv/data,options=rbind:rw"
    # A destination behind a symbolic link of the image: CRIU knows only where it leads.
    linked = "type=bind,src=/var/tmp/bind/one,dst=/srv/one,options=bind:ro"
    container = run(
        "i=0; while :; do i=$((i+1)); echo $i > /count; cat /srv/one > /srv/data/two; "
        "cat /proc/keys > /masked; sleep 0.02; done",
        "--null-io",
        *("--mount", mount, "--mount", linked),
    )
    counts_on(container, 3)
    container.pause()
    before = stands_still(container)
    assert "error" not in container.dump()
    container.forget()
    (data / "one").write_text("second")
    container.restore()
    counts_on(container, before)
    wait_until(lambda: (data / "two").read_text() == "second", "the bind mounts are alive")
    assert container.file("/masked") == ""


def test_namespaces_by_path_are_joined_not_dumped(
    run: Callable[..., Container], node: Node
) -> None:
    # Its init reaps what the container leaves, as the pause program of a pod does.
    sandbox = run()
    counts_on(sandbox, 3)
    pid = sandbox.pid()
    spaces = [f"{kind}:/proc/{pid}/ns/{file}" for kind, file in NAMESPACES.items()]
    container = run(COUNT, "--null-io", *(f"--with-ns={space}" for space in spaces))
    counts_on(container, 3)
    container.pause()
    before = stands_still(container)
    answer = container.dump()
    assert "error" not in answer
    container.forget()
    container.restore()
    counts_on(container, before)
    restored = container.pid()
    for file in NAMESPACES.values():
        theirs, ours = (node.path(f"/proc/{p}/ns/{file}").readlink() for p in (pid, restored))
        assert theirs == ours


NAMESPACES = {"network": "net", "pid": "pid", "ipc": "ipc"}


def test_a_terminal(run: Callable[..., Container]) -> None:
    container = run(COUNT, "--tty")
    counts_on(container, 3)
    container.pause()
    before = stands_still(container)
    answer = container.dump()
    assert "error" not in answer
    container.forget()
    ours, theirs = os.openpty()
    try:
        with container.node.popen(
            container.restore_command(), stdin=theirs, stdout=theirs, stderr=theirs
        ) as restored:
            os.close(theirs)
            if container.node.cgroup == "v1":
                time.sleep(1)
                container.node.run([*RUNC, "resume", container.id], check=False)
            counts_on(container, before)
            container.node.run([*RUNC, "kill", container.id, "KILL"])
            restored.wait(20)
    finally:
        os.close(ours)


def test_a_mount_that_a_hook_made_is_dumped_and_can_be_made_again(
    run: Callable[..., Container], node: Node
) -> None:
    node.path("/var/tmp/hooked").write_text("from outside")
    container = run(f"mkdir -p /lib; touch /lib/hooked; {COUNT}")
    counts_on(container, 3)
    # As nvidia-container-cli does it: from outside, into the container's mount namespace.
    node.run(["python3", "-c", BIND_INTO, str(container.pid()), "/var/tmp/hooked", "/lib/hooked"])
    container.pause()
    before = stands_still(container)
    assert "error" not in container.dump()
    container.forget()
    # runc knows nothing of the mount: CRIU's configuration file must say what goes there.
    again = config.file_text([("external", "mnt[/lib/hooked]:/var/tmp/hooked")])
    node.path("/var/tmp/hooked.conf").write_text(again)
    spec = node.path(f"{BUNDLES}/{container.id}/config.json")
    changed = json.loads(spec.read_text())
    changed["annotations"] = {"org.criu.config": "/var/tmp/hooked.conf"}
    spec.write_text(json.dumps(changed))
    container.restore()
    counts_on(container, before)
    seen = node.path(f"/proc/{container.pid()}/root/lib/hooked")
    assert seen.read_text() == "from outside"


BIND_INTO = """
import ctypes, os, sys
pid, source, target = sys.argv[1:]
libc = ctypes.CDLL(None, use_errno=True)
OPEN_TREE, MOVE_MOUNT, AT_FDCWD, CLONE, EMPTY_PATH = 428, 429, -100, 1, 4
tree = libc.syscall(OPEN_TREE, AT_FDCWD, source.encode(), CLONE)
assert tree >= 0, os.strerror(ctypes.get_errno())
space = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
assert libc.setns(space, 0x20000) == 0, os.strerror(ctypes.get_errno())
assert libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, target.encode(), EMPTY_PATH) == 0, \\
    os.strerror(ctypes.get_errno())
"""


def test_through_a_running_service(counting: Container) -> None:
    before = stands_still(counting)
    service = f"/run/{counting.id}.criu"
    with counting.node.popen(
        ["criu", "service", "--address", service], stdin=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(counting.node.path(service).exists, "the service listens")
            answer = counting.dump(service=service, options={"leave_running": True})
            assert "error" not in answer
            assert answer["after"] == "FROZEN"
            refused = counting.dump(
                service=service, options={"leave_running": True}, at="post-dump", do="refuse"
            )
            assert "criu service" in refused["error"]
            assert "refused at post-dump" in refused["error"]
            assert refused["after"] == "FROZEN"
            assert "error" not in counting.dump(service=service)
        finally:
            process.terminate()
    counting.forget()
    counting.restore()
    counts_on(counting, before)


@each
def test_the_cuda_plugin_is_there_only_when_it_is_wanted(counting: Container, node: Node) -> None:
    """CRIU_FAULT=138 is CRIU's own switch for the plugin on a machine without a GPU."""
    commands = node.path("/var/tmp/commands")
    commands.mkdir(exist_ok=True)
    (commands / "cuda-checkpoint").write_text('#!/bin/sh\n[ "$1" = -h ] && echo --action\n')
    (commands / "cuda-checkpoint").chmod(0o755)
    surroundings = {"commands": "/var/tmp/commands", "extra": {"CRIU_FAULT": "138"}}
    answer = counting.dump(options={"leave_running": True}, environment=surroundings)
    assert "error" not in answer
    assert "cuda_plugin" not in counting.log()
    surroundings["plugins"] = "/plugins"
    answer = counting.dump(options={"leave_running": True}, environment=surroundings)
    assert "error" not in answer
    assert "cuda_plugin: initialized" in counting.log()
    assert answer["after"] == "FROZEN"


@each
def test_a_configuration_file_has_the_last_word(counting: Container, node: Node) -> None:
    text = config.file_text([("libdir", "/no where"), ("timeout", "33")])
    node.path("/var/tmp/criu.conf").write_text(text)
    answer = counting.dump(options={"leave_running": True, "config_file": "/var/tmp/criu.conf"})
    assert "Unable to open directory /no where" in answer["first_error"]
    node.path("/var/tmp/criu.conf").write_text(config.file_text([("timeout", "33")]))
    answer = counting.dump(options={"leave_running": True, "config_file": "/var/tmp/criu.conf"})
    assert "error" not in answer
    assert "timeout: 33s" in counting.log()


# --- dumps that fail ----------------------------------------------------------------------


def unharmed(container: Container, answer: dict[str, Any], before: int) -> None:
    """After a failed dump: frozen as before, and whole: it goes on, and can be dumped."""
    assert answer["after"] == "FROZEN"
    assert stands_still(container) == before
    assert container.node.pids("criu") == []
    assert not network_locked(container)
    container.node.ctr("task", "resume", container.id)
    counts_on(container, before)
    container.pause()
    again = container.dump(options={"leave_running": True, "tcp_established": True})
    assert "error" not in again


def network_locked(container: Container) -> bool:
    inside = ["nsenter", f"--net=/proc/{container.pid()}/ns/net", "--"]
    tools = ("iptables", "ip6tables")
    listed = [container.node.run([*inside, tool, "-S"]).stdout for tool in tools]
    return any("CRIU" in rules for rules in listed)


def test_an_open_tcp_connection_is_refused_unless_allowed(
    run: Callable[..., Container], node: Node
) -> None:
    if node.name == "13":
        pytest.skip("CRIU before 4.2 dumps no network socket on kernels from 6.16")
    # nc connects to itself within the container's own loopback.
    container = run(
        "ip link set lo up; nc -l -p 7000 -e cat & sleep 0.3; "
        "(sleep 1000 | nc 127.0.0.1 7000) & sleep 0.3; " + COUNT
    )
    counts_on(container, 3)
    container.pause()
    before = stands_still(container)
    answer = container.dump(options={"leave_running": True})
    assert "Connected TCP socket" in answer["first_error"]
    assert "tcp_established" in answer["error"]
    assert f"{container.work}/dump.log" in answer["error"]
    unharmed(container, answer, before)


def test_a_full_disk(counting: Container) -> None:
    before = stands_still(counting)
    answer = counting.dump(options={"leave_running": True}, tmpfs="64k")
    assert "No space left" in answer["error"]
    assert "image directory is full" in answer["error"]
    unharmed(counting, answer, before)


@each
@pytest.mark.parametrize("at", ["pre-dump", "query-ext-files", "post-dump"])
def test_criu_killed_at_a_notification(counting: Container, at: str) -> None:
    answer = counting.dump(at=at, do="kill")
    assert answer["died"]
    assert "killed by signal 9" in answer["error"]
    assert answer["refrozen"] is True
    # The thaw that lets CRIU's code leave the processes lets them run for a moment.
    unharmed(counting, answer, counting.count())


@pytest.fixture
def big(run: Callable[..., Container]) -> Container:
    """A container with enough memory in one process to be caught while it is dumped."""
    container = run(
        # Its own reader, dd fills the pipe and waits with its buffer in hand, for ever.
        "mkfifo /fifo; (exec 3<>/fifo; /bin/dd if=/dev/zero of=/fifo bs=700M count=1; "
        "echo $? > /ended) & " + COUNT
    )
    memory = container.node.path("/proc")
    wait_until(
        lambda: any(
            int((memory / str(pid) / "statm").read_text().split()[1]) > 150_000
            for pid in container.node.pids("dd")
        ),
        "dd has filled its buffer",
    )
    counts_on(container, 3)
    container.pause()
    return container


def test_a_dump_cancelled_while_memory_is_written_is_undone_by_criu(big: Container) -> None:
    before = stands_still(big)
    answer = big.dump(at="pages", do="cancel")
    assert "the dump was cancelled" in answer["error"]
    assert not answer["died"]
    unharmed(big, answer, before)
    assert big.file("/ended") == ""


def test_a_criu_that_hangs_is_killed_after_the_deadline(big: Container) -> None:
    stands_still(big)
    answer = big.dump(at="query-ext-files", do="stop", deadline=1, grace=1)
    assert "the deadline of 1 s passed" in answer["error"]
    assert "was killed" in answer["error"]
    assert answer["died"]
    unharmed(big, answer, big.count())
    assert big.file("/ended") == ""


def test_criu_killed_while_memory_is_written(big: Container) -> None:
    """compel's code is in the process then: it must have left it before the freeze."""
    stands_still(big)
    answer = big.dump(at="pages", do="kill")
    assert answer["died"]
    assert answer["refrozen"] is True
    (dd,) = big.node.pids("dd")
    maps = big.node.path(f"/proc/{dd}/maps").read_text().splitlines()
    code = [line.split()[0].split("-") for line in maps if "CRIUMFD" in line]
    place = int(big.node.path(f"/proc/{dd}/syscall").read_text().split()[-1], 16)
    assert not any(int(start, 16) <= place < int(end, 16) for start, end in code)
    unharmed(big, answer, big.count())
    assert big.file("/ended") == ""
    before = stands_still(big)
    assert "error" not in big.dump()
    big.forget()
    big.restore()
    counts_on(big, before)


@each
@pytest.mark.parametrize(
    ("action", "words", "at"),
    [
        ("refuse", "refused at {at}", "pre-dump"),
        ("refuse", "refused at {at}", "query-ext-files"),
        ("refuse", "refused at {at}", "post-dump"),
        ("raise", "refused at {at}: no room for this dump", "query-ext-files"),
        ("cancel", "the dump was cancelled", "pre-dump"),
        ("cancel", "the dump was cancelled", "post-dump"),
    ],
)
def test_a_dump_that_is_called_off(counting: Container, at: str, action: str, words: str) -> None:
    before = stands_still(counting)
    answer = counting.dump(at=at, do=action)
    assert words.format(at=at) in answer["error"]
    assert not answer["died"]
    unharmed(counting, answer, before)


def test_a_cancel_after_the_last_image_was_written_comes_too_late(counting: Container) -> None:
    answer = counting.dump(options={"leave_running": True}, at="network-unlock", do="cancel")
    assert "error" not in answer


def test_the_deadline_ends_a_dump(counting: Container) -> None:
    before = stands_still(counting)
    answer = counting.dump(deadline=0)
    assert "the deadline of 0 s passed" in answer["error"]
    unharmed(counting, answer, before)


@on_one
def test_no_criu(counting: Container) -> None:
    answer = counting.dump(env={"PATH": "/nowhere"})
    assert "no executable criu on PATH /nowhere" in answer["error"]
    assert answer["after"] == "FROZEN"
