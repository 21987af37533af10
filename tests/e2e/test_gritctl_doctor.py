"""The doctor's verdict beside reality: what it says can work is then tried, and what it says cannot
is seen to fail."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import CONFIG, configure
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_failures import tmpfs
from tests.e2e.test_gritctl_stored import gritctl
from tests.nodes.installed import ENVIRONMENT
from tests.nodes.node import ENVIRONMENT as NODE_ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

PLACE = "/var/tmp/doctor"

OLD_CRIU = f"""\
#!{ENVIRONMENT}/bin/python
import socket, sys
from shim.criu_bridge import rpc
connection = socket.socket(fileno=int(sys.argv[2]))
connection.recv(1 << 16)
version = rpc.Version(major_number=3, minor_number=17, sublevel=1)
connection.send(rpc.CriuResp(type=rpc.VERSION, success=True, version=version).encode())
"""


@pytest.fixture(scope="module", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[Place]:
    """As everywhere, but always with cgroup v1: hosts that have both keep memory there."""
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(request.param, cgroup="v1", binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        yield node, gpu.gpu_of(node, capacity=16 << 20)


@pytest.fixture(autouse=True)
def _place(request: pytest.FixtureRequest) -> Iterator[None]:
    if "gpu_node" not in request.fixturenames:
        yield
        return
    node, board = request.getfixturevalue("gpu_node")
    configure(node)
    node.path(PLACE).mkdir()
    yield
    board.end_faults()
    configure(node)
    shutil.rmtree(node.path(PLACE))


def verdict(node: Node, *words: str, status: int) -> dict[str, dict[str, str]]:
    """The doctor's lines by their check's name; both forms must say the same."""
    text = gritctl(node, "doctor", *words, status=status)
    assert ("A checkpoint cannot work here." in text) == (status == 3)
    document = json.loads(gritctl(node, "doctor", "--json", *words, status=status))
    assert document["verdict"] == ("fail" if status else "pass")
    for line in document["checks"]:
        assert re.search(
            rf"^{line['status']}  +{re.escape(line['check'])}  ", text, re.M | re.I
        ) or (
            line["status"] == "pass"
            and re.search(rf"^ok  +{re.escape(line['check'])}  ", text, re.M)
        )
        assert line["status"] != "fail" or line["fix"] or "container" in line["check"]
    return {line["check"]: line for line in document["checks"]}


def failing(lines: dict[str, dict[str, str]]) -> set[str]:
    return {name for name, line in lines.items() if line["status"] == "fail"}


def works(node: Node) -> None:
    gritctl(node, "checkpoint", "job", "--to", f"{PLACE}/job")
    gritctl(node, "rm", f"{PLACE}/job")


def does_not(node: Node, *, to: str = f"{PLACE}/job") -> str:
    return gritctl(node, "checkpoint", "job", "--to", to, status=1)


def test_a_good_node(gpu_node: Place, start_job: StartJob, engine: str) -> None:
    node, _ = gpu_node
    configure(node, engine=engine)
    start_job()
    lines = verdict(node, "job", "--to", PLACE, status=0)
    assert engine in lines["engine"]["found"]
    assert lines["container job"]["found"] == "1 processes, 1 with the GPU (4.0 MiB in use)"
    assert re.match(r"4\.[12]", lines["CRIU"]["found"])
    for check in (
        "kernel", "cgroups", "huge pages", "grit.toml", "CRIU's check", "CRIU's settings", "driver",
        "GPUs", "libcuda", "CRIU plugin", "toolkit", "memory", "disk", "shim", "stock shim", "runc",
        "runtime", "containerd", "snapshotter", "cuda-checkpoint",
    ):  # fmt: skip
        assert check in lines
    assert lines["containerd"]["found"].startswith(".".join(map(str, node.containerd_version)))
    works(node)


@contextlib.contextmanager
def without(node: Node, path: str) -> Iterator[None]:
    file = node.path(path)
    file.rename(f"{file}.away")
    try:
        yield
    finally:
        node.path(f"{path}.away").rename(file)


@on_forky
def test_criu_missing(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    criu = node.run(["sh", "-c", "command -v criu"]).stdout.strip()
    with without(node, criu.replace("/sbin", "/usr/sbin", 1) if criu[:5] == "/sbin" else criu):
        lines = verdict(node, "--to", PLACE, status=3)
        assert failing(lines) == {"CRIU"}
        assert "no executable criu" in lines["CRIU"]["found"]
        assert "no executable criu" in does_not(node)
    verdict(node, "--to", PLACE, status=0)
    works(node)


@on_forky
def test_criu_too_old(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    path = node.path("/usr/local/bin/old-criu")
    path.write_text(OLD_CRIU)
    path.chmod(0o755)
    configure(node, criu="/usr/local/bin/old-criu")
    start_job()
    lines = verdict(node, "--to", PLACE, status=3)
    assert "CRIU" in failing(lines)
    assert "3.17.1: 4.1 or later is needed" in lines["CRIU"]["found"]
    assert "CRIU is 3.17.1" in does_not(node)


@on_forky
def test_plugin_missing(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    configure(node, engine="plugin", plugin_dir="/nowhere")
    start_job()
    lines = verdict(node, "--to", PLACE, status=3)
    assert failing(lines) == {"engine", "CRIU plugin"}
    assert "/nowhere/cuda_plugin.so does not exist" in lines["CRIU plugin"]["found"]
    assert "/nowhere/cuda_plugin.so does not exist" in does_not(node)
    configure(node, engine="driver", plugin_dir="/nowhere")
    assert verdict(node, "--to", PLACE, status=0)["CRIU plugin"]["status"] == "pass"


@on_forky
def test_driver_absent(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    configure(node, libcuda="/nowhere/libcuda.so.1")
    start_job()
    lines = verdict(node, "--to", PLACE, status=3)
    assert {"driver", "libcuda"} <= failing(lines)
    assert "/nowhere/libcuda.so.1" in lines["libcuda"]["found"]
    assert "/nowhere/libcuda.so.1" in does_not(node)
    lines = verdict(node, "--no-gpu", "--to", PLACE, status=0)
    assert "libcuda" not in lines


@on_forky
def test_a_mistake_in_the_configuration(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    node.path(CONFIG).write_text("[grit]\nlock_timout = 3\n")
    lines = verdict(node, "--to", PLACE, status=3)
    assert failing(lines) == {"grit.toml"}
    assert "did you mean lock_timeout?" in lines["grit.toml"]["found"]
    done = start_job(run=False).try_run()
    assert done.returncode != 0 and "did you mean lock_timeout?" in done.stderr


@on_forky
def test_low_memory_limit(gpu_node: Place, start_job: StartJob) -> None:
    """Of the container: the node itself is fine."""
    node, _ = gpu_node
    start_job(options=[f"--memory-limit={48 << 20}"])
    verdict(node, "--to", PLACE, status=0)
    lines = verdict(node, "job", "--to", PLACE, status=3)
    assert failing(lines) == {"container job"}
    assert "Raise the limit" in lines["container job"]["found"]
    assert "Raise the limit" in does_not(node)


@on_forky
def test_full_disk(gpu_node: Place, start_job: StartJob) -> None:
    node, _ = gpu_node
    start_job()
    small = f"{PLACE}/small"
    with tmpfs(node, small, "2m"):
        lines = verdict(node, "job", "--to", f"{small}/job", status=3)
        assert failing(lines) == {"disk", "container job"}
        assert "free in /var/tmp/doctor/small" in lines["disk"]["found"]
        text = does_not(node, to=f"{small}/job")
        assert "free" in text or "full" in text


# --- containerd's configuration -----------------------------------------------------------

WRONG = """\
version = 2
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.grit]
  runtime_type = "io.containerd.grit.v1"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.grit.options]
    TypeUrl = "containerd.runc.v1.Options"
    ConfigPath = "/etc/containerd/nowhere.toml"
"""


@pytest.mark.parametrize("name", ["13", "forky"])
def test_wrong_containerd_configuration(name: str, make_node: Callable[..., Node]) -> None:
    """One node after the other, each with its own containerd."""
    path = NODE_ENVIRONMENT["PATH"].replace("/usr/local/bin:", "")
    node = make_node(name, binds=gpu.kit_binds(), env={"PATH": path})
    board = gpu.gpu_of(node, capacity=16 << 20)
    configure(node)
    lines = verdict(node, status=3)
    assert failing(lines) == {"shim"}
    assert "is not in containerd's PATH" in lines["shim"]["found"]
    done = gpu.Job(node, board, "job").try_run()
    assert done.returncode != 0 and "containerd-shim-grit-v1" in done.stderr

    node.stop_containerd()
    node.start_containerd(WRONG)
    lines = verdict(node, status=3)
    assert "ConfigPath /etc/containerd/nowhere.toml does not exist" in str(lines["runtime grit"])

    node.stop_containerd()
    node.start_containerd(WRONG.replace("grit.v1", "grid.v1"))
    lines = verdict(node, status=3)
    assert "has runtime_type 'io.containerd.grid.v1'" in lines["runtime"]["found"]

    node.stop_containerd()
    node.start_containerd(WRONG.replace("nowhere.toml", "grit.toml"))
    lines = verdict(node, status=0)
    assert "annotations grit.dev/* do not reach it" in lines["runtime grit"]["found"]

    node.stop_containerd()
    lines = verdict(node, status=3)
    assert "containerd" in failing(lines)
