"""The quick start on two played nodes with simulated GPUs, on a Debian forky of its own: all of
`test_real_two_nodes.py` but the driver and PyTorch. Its Python is not the GPU machine's, and so its
kits are others:

    python -m tests.gpu.pack /var/tmp/kits 3.14; python -m tests.gpu.pack_kube /var/tmp/kits 3.14
    python -m tests.gpu.rehearse /var/tmp/kits /var/tmp/results [NUMBER OF GPUS, 2]
"""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_SOURCE = "/usr/src/grit"
_OUT = "/mnt/out"
_PYTHON = "/opt/python/bin/python"
_BOARDS = Path("/var/lib/simgpu")
_INSIDE = "--inside"


def outside(kits: Path, out: Path, gpus: str = "2") -> int:
    """Runs it in a node; returns its exit status."""
    from tests.e2e import gpu
    from tests.e2e.pods.conftest import CGROUP
    from tests.nodes.node import Node

    binds = {_SOURCE: REPOSITORY, f"{_SOURCE}/.gpu": kits.resolve(), **gpu.kit_binds()}
    for name in ("mount", "umount"):  # the node has their libraries only
        binds[f"/usr/bin/{name}"] = Path("/usr/bin", name)
    (REPOSITORY / ".gpu").mkdir(exist_ok=True)
    out.mkdir(exist_ok=True, parents=True)
    with Node("forky", cgroup=CGROUP, binds=binds, shares={_OUT: out.resolve()}) as node:
        # What lies below a containerd's root must not lie on an overlay.
        node.run(["sh", "-c", "mkdir /opt/grit-gpu-nodes; mount -t tmpfs t /opt/grit-gpu-nodes"])
        node.run(["python3", "-m", "venv", "/opt/python"], timeout=120)
        words = [_PYTHON, "-m", "tests.gpu.rehearse", _INSIDE, gpus]
        process = node.popen(words, cwd=_SOURCE, env={"OUT": _OUT}, stdin=subprocess.DEVNULL)
        return process.wait(300)


def inside(gpus: int) -> None:
    from tests.gpu import kube_kit

    kube_kit.install()

    from tests.e2e import gpu
    from tests.gpu import kube, two_nodes
    from tests.gpu.machine import Machine
    from tests.gpu.played import PlayedNode
    from tests.gpu.results import Results
    from tests.simgpu.simgpu import BOARDS, KIT, WORKLOAD, Kit, SimGpu

    board = SimGpu(_BOARDS, Kit(Path(KIT)), gpus=gpus, capacity=64 << 20).create()
    for device in (_BOARDS / "dev").iterdir():
        os.mknod(f"/dev/{device.name}", 0o666 | stat.S_IFCHR, board.device.st_rdev)
    os.environ["SIMGPU_DIR"] = str(_BOARDS)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        Path(gpu.LIBRARIES, name).symlink_to(f"{KIT}/lib/{name}")
    gpu.kernel_driver(Machine(), *["NVIDIA H200"] * gpus)

    def given(node: PlayedNode, card: int) -> kube.Given:
        environment = dict(entry.split("=", 1) for entry in board.container_env())
        boards = {"container_path": BOARDS, "host_path": str(_BOARDS)}
        base = kube.given(node, [f"/dev/nvidia{card}"])
        return dataclasses.replace(
            base,
            environment={**base.environment, **environment},
            mounts=[*base.mounts, boards],
        )

    cards = two_nodes.Cards((0, gpus - 1), given, lambda card: sum(board.owners(card).values()))
    argv = [WORKLOAD, "--tick-ms", "10", "--status", "/job/status", "--token-file", "/token"]
    workload = two_nodes.Workload([*argv, "--bytes", str(8 << 20)], ("device", "cpu", "file"))
    store = Path("/dev/shm/grit-gpu/store")
    store.mkdir(parents=True)
    two_nodes.quick_start(workload, cards, store, Results.here())


if __name__ == "__main__":
    if _INSIDE in sys.argv:
        inside(int(sys.argv[-1]))
    else:
        sys.exit(outside(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:4]))
