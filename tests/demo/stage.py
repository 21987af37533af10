"""The demo's node: Debian 13 with containerd, grit, a simulated GPU, and CRIU's CUDA plugin where
the stock shim finds it. All of it is in namespaces of its own and goes when the node is closed."""

from __future__ import annotations

import array
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e import gpu
from tests.nodes.image import build_image
from tests.nodes.installed import CUDA_PLUGIN, ENVIRONMENT, installed_node, refresh

if TYPE_CHECKING:
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

CPU_BYTES = 64 << 20
DEVICE_BYTES = 32 << 20
WORDS = ("--bytes", str(DEVICE_BYTES), "--cpu-bytes", str(CPU_BYTES))

# Stands for NVIDIA's command, which asks the driver whatever state the process is in. (Ours looks
# first.) CRIU gives its plugin's commands a directory as standard input, where runc runs it.
NVIDIA_COMMAND = f"""\
#!/bin/sh
exec {ENVIRONMENT}/bin/python -I -c '
import sys
from shim.cuda import command, discovery
discovery.standstill = lambda pid: ""
sys.exit(command.main())
' "$@" </dev/null
"""


def make() -> Node:
    """The node, yet to be started."""
    return installed_node("13", binds=gpu.kit_binds())


def furnish(node: Node) -> SimGpu:
    """Starts containerd and puts all there is in place; returns the node's GPU."""
    refresh(node)
    node.start_containerd(env=gpu.NO_GPU_CHECK)
    node.import_image(build_image("local/busybox", "1", {}))
    node.path(gpu.CONFIG).write_text("[grit]\n")
    node.path("/usr/lib/criu").mkdir(parents=True, exist_ok=True)
    node.path("/usr/lib/criu/cuda_plugin.so").symlink_to(f"{CUDA_PLUGIN}/cuda_plugin.so")
    command = node.path("/usr/local/bin/cuda-checkpoint")
    command.write_text(NVIDIA_COMMAND)
    command.chmod(0o755)
    return gpu.gpu_of(node, capacity=2 * DEVICE_BYTES)


def parts(node: Node) -> str:
    """The versions of what takes part."""
    containerd = node.run(["containerd", "--version"]).stdout.split()[2]
    runc = node.run(["runc", "--version"]).stdout.split()[2]
    criu = node.run(["criu", "--version"]).stdout.split()[1]
    return f"containerd {containerd}, runc {runc}, CRIU {criu}, Linux {os.uname().release}"


def digest(device: bytes) -> str:
    """The workload's digest of its device memory (simgpu's workload.c), taken from the bytes: every
    word has grown by the same amount since the start, and is counted less that."""
    words = array.array("Q", device)
    mask = (1 << 64) - 1
    grown = words[0] - _first_word(seed=1)
    result = 0
    for word in words:
        result = ((result ^ (word - grown & mask)) * 0x100000001B3 + (result >> 47)) & mask
    return f"{result:016x}"


def _first_word(seed: int) -> int:
    mask = (1 << 64) - 1
    value = (seed * 0x10001 + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def left_on_host(identity: str) -> list[str]:
    """What this machine still has of a node: mounts, cgroups and processes with its name."""
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
