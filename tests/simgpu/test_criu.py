"""The simulated GPU before a real CRIU: refused while attached, dumped and restored while not, and
suspended by CRIU's own CUDA plugin, which lets the restore thread alone run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.nodes import cuda_plugin
from tests.nodes.node import ENVIRONMENT, Node
from tests.simgpu import simgpu
from tests.simgpu.conftest import wait_for
from tests.simgpu.simgpu import CHECKPOINTED, KIT, RUNNING, SUCCESS, WORKLOAD, SimGpu

if TYPE_CHECKING:
    from tests.simgpu.simgpu import Kit

BUNDLE = "/root/bundle"
IMAGES = "/root/images"
OPTIONS = ["--tcp-established", "--file-locks"]


PLUGIN = "/root/plugin"
COMMAND = f"""\
#!/usr/bin/python3
import ctypes, sys
cuda = ctypes.CDLL("{KIT}/lib/libcuda.so.1")
if "-h" in sys.argv:
    sys.exit(print("--action"))
pid, value = int(sys.argv[sys.argv.index("--pid") + 1]), ctypes.c_int()
if "--get-restore-tid" in sys.argv:
    code = cuda.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(value))
    print(value.value)
elif "--get-state" in sys.argv:
    code = cuda.cuCheckpointProcessGetState(pid, ctypes.byref(value))
    print(["running", "locked", "checkpointed", "failed"][value.value])
else:
    action = sys.argv[sys.argv.index("--action") + 1]
    code = getattr(cuda, "cuCheckpointProcess" + action.capitalize())(pid, None)
sys.exit(code != 0)
"""


@pytest.fixture(params=["13", "forky"])
def node(request: pytest.FixtureRequest, kit: Kit) -> Iterator[Node]:
    with Node(request.param, binds={KIT: kit.root}) as node:
        yield node


def install_plugin(node: Node) -> dict[str, str]:
    """CRIU's CUDA plugin with a `cuda-checkpoint`; returns the environment that makes it run."""
    node.path(f"{PLUGIN}/bin").mkdir(parents=True)
    (built,) = cuda_plugin.directory(node.name).iterdir()
    node.path(f"{PLUGIN}/{built.name}").write_bytes(built.read_bytes())
    command = node.path(f"{PLUGIN}/bin/cuda-checkpoint")
    command.write_text(COMMAND)
    command.chmod(0o755)
    node.path("/etc/criu").mkdir(exist_ok=True)
    node.path("/etc/criu/runc.conf").write_text(f"libdir {PLUGIN}\n")
    return {"CRIU_FAULT": "138", "PATH": f"{PLUGIN}/bin:{ENVIRONMENT['PATH']}"}


class Container:
    """A container that runc alone made, with nothing in its root but the workload's files."""

    def __init__(self, node: Node, gpu: SimGpu) -> None:
        self.node = node
        self.root = node.path(f"{BUNDLE}/rootfs")
        self.root.mkdir(parents=True)
        node.run(["runc", "spec", "--bundle", BUNDLE])
        config = node.path(f"{BUNDLE}/config.json")
        spec = json.loads(config.read_text())
        spec["root"]["readonly"] = False
        spec["process"]["terminal"] = False
        spec["process"]["args"] = [WORKLOAD, "--tick-ms", "10", "--status", "/status"]
        spec["process"]["args"] += ["--flock", "/flocked", "--fcntl-lock", "/locked"]
        spec["process"]["args"] += ["--token-file", "/token", "--procs", "init,map,cpu"]
        # CRIU 4.1 dumps no internet socket on Linux 6.16 and later (checkpoint-restore/criu#2705).
        spec["process"]["args"] += ["--tcp"] if node.name == "forky" else []
        # As an orchestrator does: a network of runc's own making has no loopback after restore.
        node.run(["ip", "netns", "add", "one"])
        node.run(["ip", "-n", "one", "link", "set", "lo", "up"])
        network = next(n for n in spec["linux"]["namespaces"] if n["type"] == "network")
        network["path"] = "/run/netns/one"
        gpu.add_to(spec)
        config.write_text(json.dumps(spec))
        self.runc("run", "--detach", "--bundle", BUNDLE)

    def runc(self, command: str, *options: str, **env: str) -> None:
        """Like containerd, with the container's stdio elsewhere than in a file of ours."""
        argv = ["runc", "--log", "/root/log", command, *options, "one"]
        null = subprocess.DEVNULL
        process = self.node.popen(argv, env=env, stdin=null, stdout=null, stderr=null)
        assert process.wait(60) == 0, self.node.path("/root/log").read_text()

    def pid(self) -> int:
        """On the host."""
        state = json.loads(self.node.run(["runc", "state", "one"]).stdout)
        return self.node.host_pid(state["pid"])

    def reports(self) -> list[simgpu.Report]:
        return simgpu.reports(self.root / "status")

    def next_report(self) -> simgpu.Report:
        before = len(self.reports())
        wait_for("next report", lambda: len(self.reports()) >= before + 2)
        return self.reports()[-1]

    def checkpoint(self, **env: str) -> tuple[int, str]:
        """The exit status of runc and CRIU's log."""
        self.node.run(["rm", "-rf", IMAGES])
        images = ["--image-path", IMAGES, "--work-path", IMAGES]
        done = self.node.run(["runc", "checkpoint", *images, *OPTIONS, "one"], check=False, env=env)
        return done.returncode, self.node.path(f"{IMAGES}/dump.log").read_text()

    def restore(self, **env: str) -> None:
        images = ["--image-path", IMAGES, "--work-path", IMAGES, "--bundle", BUNDLE]
        self.runc("restore", "--detach", *images, *OPTIONS, **env)


def cuda_pids(pid: int, gpu: SimGpu) -> list[int]:
    """The processes of the tree that have CUDA."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for p in (pid, *map(int, children)) if gpu.library.state(p)[0] == SUCCESS]


@pytest.fixture
def gpu(node: Node, kit: Kit) -> SimGpu:
    return SimGpu.in_node(node, kit).create()


def test_criu_refuses_an_attached_process_and_leaves_it_running(node: Node, gpu: SimGpu) -> None:
    container = Container(node, gpu)
    container.next_report()

    status, log = container.checkpoint()

    assert status != 0
    assert "(chr " in log, log[-3000:]
    assert container.next_report().ok


def test_a_detached_tree_is_dumped_and_restored_whole(node: Node, gpu: SimGpu) -> None:
    container = Container(node, gpu)
    before = container.next_report()
    pids = cuda_pids(container.pid(), gpu)
    assert len(pids) == 2
    for pid in pids:
        assert gpu.library.lock(pid, 10_000) == SUCCESS
        assert gpu.library.checkpoint(pid) == SUCCESS
    assert gpu.owners() == {}

    status, log = container.checkpoint()
    assert status == 0, log[-3000:]
    counter = container.reports()[-1].counter
    (gpu.directory / "gpu0/memory").write_bytes(bytes(gpu.capacity))
    container.restore()

    pids = cuda_pids(container.pid(), gpu)
    assert len(pids) == 2
    for pid in pids:
        assert gpu.library.state(pid) == (SUCCESS, CHECKPOINTED)
        assert gpu.library.restore(pid) == SUCCESS
        assert gpu.library.unlock(pid) == SUCCESS
        assert gpu.library.state(pid) == (SUCCESS, RUNNING)
    after = container.next_report()
    assert after.ok
    assert after.counter > counter
    assert (after.device, after.cpu, after.file) == (before.device, before.cpu, before.file)
    assert [r.counter for r in container.reports()] == list(range(after.counter + 1))


def test_criu_with_its_cuda_plugin_suspends_dumps_and_restores(node: Node, gpu: SimGpu) -> None:
    env = install_plugin(node)
    container = Container(node, gpu)
    before = container.next_report()

    status, log = container.checkpoint(**env)
    assert status == 0, log[-3000:]
    assert log.count("cuda_plugin: Checkpointing CUDA devices") == 2
    assert gpu.owners() == {}
    container.restore(**env)

    for pid in cuda_pids(container.pid(), gpu):
        assert gpu.library.state(pid) == (SUCCESS, RUNNING)
    after = container.next_report()
    assert (after.ok, after.device, after.cpu) == (True, before.device, before.cpu)
