"""A GPU job that moves from one node to another over TLS, between two nodes that share nothing but
a wire: it goes on there with its values, or runs on here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import configure, go_on, until
from tests.e2e.marks import on_forky
from tests.e2e.test_encrypted import KEY, give_key
from tests.e2e.test_gpu_checkpoint import unbroken
from tests.e2e.test_gpu_pause import hold_criu, signal_all
from tests.e2e.test_gritctl_help import examples
from tests.e2e.test_gritctl_stored import gritctl
from tests.gritctl.certificates import authority, certificate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node, Process
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

pytestmark = on_forky

PLACE = "/var/lib/checkpoints"
KEYS = "/etc/grit-keys"
HERE, THERE = "10.98.0.1", "10.98.0.2"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("keys")
    authority(top)
    for name in ("node-a", "node-b"):
        certificate(top, name)
    return top


@pytest.fixture(scope="module")
def far(keys: Path) -> Iterator[Place]:
    """The other node, with a GPU of its own."""
    env = gpu.ENVIRONMENT_OF_GRIT
    with running("forky", binds=gpu.kit_binds(), env=env) as node:
        yield node, gpu.gpu_of(node, capacity=16 << 20)


@pytest.fixture
def places(gpu_node: Place, far: Place, keys: Path) -> Iterator[tuple[Node, Node]]:
    """Both, with a wire between them."""
    here, there = gpu_node[0], far[0]
    enter = ["nsenter", f"--net=/proc/{here.pid}/ns/net", "--", "ip", "link", "add", "wire"]
    peer = ["type", "veth", "peer", "name", "wire", "netns", str(there.pid)]
    subprocess.run([*enter, *peer], check=True)
    hosts = here.path("/etc/hosts").read_text()
    here.path("/etc/hosts").write_text(f"{hosts}{THERE} node-b\n")
    for node, name, address in ((here, "node-a", HERE), (there, "node-b", THERE)):
        configure(node)
        node.path(PLACE).mkdir(parents=True, exist_ok=True)
        node.path(KEYS).mkdir()
        for file in ("crt", "key"):
            shutil.copy(keys / f"{name}.{file}", node.path(f"{KEYS}/node.{file}"))
        shutil.copy(keys / "ca.crt", node.path(f"{KEYS}/ca.crt"))
        node.run(["ip", "addr", "add", f"{address}/24", "dev", "wire"])
        node.run(["ip", "link", "set", "wire", "up"])
    yield here, there
    here.run(["ip", "link", "del", "wire"])
    here.path("/etc/hosts").write_text(hosts)
    left = [list(node.path(PLACE).iterdir()) for node in (here, there)]
    for node in (here, there):
        shutil.rmtree(node.path(PLACE))
        shutil.rmtree(node.path(KEYS))
        shutil.rmtree(node.path(KEY).parent, ignore_errors=True)
        configure(node)
    assert left == [[], []], "each test removes what it has found"


def begin(node: Node, command: str, *more: str) -> Process:
    """Types the example in the subcommand's help, beside the keys."""
    (line,) = examples(command)
    pipe = subprocess.PIPE
    return node.popen([*line.split(), *more], stdout=pipe, stderr=subprocess.STDOUT, cwd=KEYS)


def receive(node: Node, *more: str) -> Process:
    """`gritctl receive`, listening."""
    process = begin(node, "receive", *more)
    assert process.stdout
    assert process.stdout.readline() == "listens on 0.0.0.0:7433\n"
    return process


def migrate(node: Node, status: int = 0) -> str:
    """What it says."""
    process = begin(node, "migrate")
    text, _ = process.communicate(timeout=60)
    assert "Traceback" not in text and process.returncode == status, text
    return text


def runs_on(job: Job, board: SimGpu) -> None:
    assert job.status() == "RUNNING"
    job.next_report()
    assert sum(board.owners().values()) == 4 << 20


def nothing_there(far: Place) -> None:
    node, board = far
    until("its end", lambda: not board.owners())
    assert node.ctr("task", "ls", "-q").stdout == node.ctr("container", "ls", "-q").stdout == ""


@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_job_moves(
    gpu_node: Place, places: tuple[Node, Node], far: Place, start_job: StartJob, encrypted: bool
) -> None:
    here, there = places
    for node in places if encrypted else ():
        give_key(node)
        configure(node, encryption_key_file=KEY)
    job = start_job()
    before = job.next_report()
    there_leaks = there.leaks()
    receiver = receive(there, "--once", "--peer", "node-a")
    text = migrate(here)
    for phase in ("suspend", "dump", "rootfs", "publish", "send", "verify", "restore", "end"):
        assert f"job: {phase}  " in text
    assert "job: runs on node-b:7433, " in text
    out, _ = receiver.communicate(timeout=30)
    assert receiver.returncode == 0 and f"{HERE}: job: runs, pid " in out
    assert job.status() == "STOPPED" and gpu_node[1].owners() == {}

    again = gpu.Job(there, far[1], "job")
    go_on(before, again.next_report())
    unbroken(again)
    assert sum(far[1].owners().values()) == 4 << 20
    manifest = there.path(f"{PLACE}/job/checkpoint/grit.json").read_text()
    assert ("encryption" in json.loads(manifest)) == encrypted
    assert "can be restored on this node" in gritctl(there, "verify", f"{PLACE}/job")
    again.end()
    assert not there.leaks() - there_leaks
    gritctl(there, "rm", f"{PLACE}/job")


def test_a_connection_cut_in_the_dump_leaves_it_running(
    gpu_node: Place, places: tuple[Node, Node], far: Place, start_job: StartJob
) -> None:
    here, there = places
    job = start_job()
    receiver = receive(there)
    process = begin(here, "migrate")
    until("a draft", lambda: list(here.path(PLACE).glob(".*/.*")))
    draft = next(iter(here.path(PLACE).glob(".*")))
    held = hold_criu(here, f"{PLACE}/{draft.name}/checkpoint")
    for pid, words in there.processes().items():
        if any(word.endswith("/gritctl") for word in words):
            signal_all([there.host_pid(pid)], signal.SIGKILL)
    receiver.communicate(timeout=30)
    signal_all(held, signal.SIGCONT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "gritctl: node-b:7433: the connection was cut. Undone: job runs on" in out
    runs_on(job, gpu_node[1])
    nothing_there(far)
    (left,) = there.path(PLACE).iterdir()  # the killed one's; the next one's begin() removes it
    shutil.rmtree(left)


def test_what_is_refused_there_runs_on_here(
    gpu_node: Place, places: tuple[Node, Node], far: Place, start_job: StartJob
) -> None:
    """All of it was sent; the other node restores only what is signed."""
    here, there = places
    job = start_job()
    there.path("/etc/grit-secret").write_bytes(b"s" * 32)
    there.path("/etc/grit-secret").chmod(0o600)
    configure(there, verify_keys=["/etc/grit-secret"])
    receiver = receive(there)
    text = migrate(here, status=1)
    assert "is not signed" in text and "Undone: job runs on" in text
    runs_on(job, gpu_node[1])
    nothing_there(far)
    # and what is not there is told before anything is done
    there.run(["mkdir", f"{PLACE}/job"])
    text = migrate(here, status=1)
    assert f"there is a {PLACE}/job already. Nothing was done to it" in text
    there.run(["rmdir", f"{PLACE}/job"])
    give_key(here)
    configure(here, encryption_key_file=KEY)
    text = migrate(here, status=1)
    assert "its checkpoint is encrypted, and here the key is " in text
    assert "grit.toml names none" in text and "Nothing was done to it" in text
    receiver.send_signal(signal.SIGTERM)
    receiver.communicate(timeout=30)
