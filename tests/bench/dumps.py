"""Checkpoint and restore by size: of plain memory, beside `runc checkpoint` and `runc restore`, and
of a simulated GPU's, beside CRIU with its CUDA plugin. `dumps_inside.py` is what measures.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.gpu import IMAGE, NO_GPU_CHECK, gpu_of, kit_binds
from tests.nodes.image import build_image
from tests.nodes.installed import CUDA_PLUGIN, ENVIRONMENT, installed_node, refresh
from tests.nodes.node import ENVIRONMENT as NODE_ENVIRONMENT
from tests.simgpu.simgpu import BOARDS, KIT, WORKLOAD

if TYPE_CHECKING:
    from tests.nodes.node import Node

GIB = 1 << 30
_SPARE = 1 * GIB
_HOUR = "3600000"  # milliseconds: the workload holds its memory and does nothing else


def plain(name: str, size: int, rounds: int) -> dict[str, Any] | str:
    """Rounds by side for a process with `size` bytes of resident memory, or why there are none. All
    is in memory: the process and the images, which lie on a tmpfs."""
    if lacks := _lacking(2 * size):
        return lacks
    with installed_node(name, binds=kit_binds()) as node:
        words = ["--kind", "cpu", "--cpu-bytes", str(size)]
        return _measure(node, words, ["runc", "grit"], rounds)


def simulated_gpu(name: str, size: int, rounds: int) -> dict[str, Any] | str:
    """The same for a process with `size` bytes of simulated device memory, which is held by the
    board, the driver's copy and the images: by CRIU's plugin under the stock shim and under grit,
    and by grit's driver engine."""
    if lacks := _lacking(3 * size):
        return lacks
    with installed_node(name, binds=kit_binds()) as node:
        gpu_of(node, capacity=size + (64 << 20))
        conf = node.path("/etc/criu/runc.conf")
        conf.parent.mkdir(exist_ok=True)
        conf.write_text(f"libdir {CUDA_PLUGIN}\ntimeout 600\n")
        words = ["--kind", "hold", "--bytes", str(size)]
        return _measure(node, words, ["stock", "grit plugin", "grit driver"], rounds)


def _lacking(need: int) -> str:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    need += _SPARE
    return (
        "" if need <= free else f"needs {need / GIB:.0f} GiB of memory, {free / GIB:.0f} are free"
    )


def _measure(node: Node, words: list[str], sides: list[str], rounds: int) -> dict[str, Any]:
    refresh(node)
    node.start_containerd()
    node.import_image(build_image("local/busybox", "1", {}))
    node.path("/etc/containerd").mkdir(exist_ok=True)
    order = {
        "sides": sides,
        "rounds": rounds,
        "spec": _specification(node, words),
        "settings": f'plugin_dir = "{CUDA_PLUGIN}"\n',
    }
    script = Path(__file__).with_name("dumps_inside.py")
    node.path("/root/dumps.py").write_bytes(script.read_bytes())
    path = f"{NODE_ENVIRONMENT['PATH']}:{ENVIRONMENT}/libexec"
    process = node.popen(
        [f"{ENVIRONMENT}/bin/python", "-I", "/root/dumps.py"],
        env={**NO_GPU_CHECK, "PATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    out, _ = process.communicate(json.dumps(order), timeout=1800)
    if process.returncode:
        raise SystemExit("the bench's part on the node failed; what it said is above")
    found: dict[str, Any] = json.loads(out)
    return found


def _specification(node: Node, words: list[str]) -> dict[str, Any]:
    """What `ctr run` would have made of it, and the image's root file system in /root/rootfs."""
    node.run(
        [
            "sh",
            "-c",
            f"mkdir /mnt/i && ctr images mount {IMAGE} /mnt/i && cp -a /mnt/i /root/rootfs",
        ]
    )
    env = [f"--env=SIMGPU_DIR={BOARDS}", f"--env=LD_LIBRARY_PATH={KIT}/lib"]
    node.path(BOARDS).mkdir(parents=True, exist_ok=True)
    mounts = [
        f"--mount=type=bind,src={place},dst={place},options=rbind:{mode}"
        for place, mode in ((KIT, "ro"), (BOARDS, "rw"))
    ]
    device = ["--device=/dev/nvidia0"] if node.path("/dev/nvidia0").exists() else []
    argv = [WORKLOAD, "--tick-ms", _HOUR, "--status", "/status", *words]
    node.ctr("container", "create", *env, *mounts, *device, IMAGE, "pattern", *argv)
    spec: dict[str, Any] = json.loads(node.ctr("container", "info", "--spec", "pattern").stdout)
    node.ctr("container", "rm", "pattern")
    spec["linux"]["cgroupsPath"] = "/bench/held"
    spec["root"]["path"] = "rootfs"
    # Not to be had where the host keeps that controller in cgroup v1.
    spec["linux"].get("resources", {}).pop("cpu", None)
    return spec
