"""What grit costs beside the stock shim on one node, and how much memory its daemon holds.
`weight_inside.py` is the part that measures.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.gpu import IMAGE, until
from tests.nodes.installed import ENVIRONMENT

if TYPE_CHECKING:
    from tests.nodes.node import Node

GROUP = 10
"""Containers of the larger group whose memory is looked at."""

SLEEP = ("/bin/sh", "-c", "while :; do sleep 1000; done")


def measure(node: Node, rounds: int, calls: int) -> Any:
    """Samples by figure and runtime: seconds, and bytes of memory."""
    script = Path(__file__).with_name("weight_inside.py")
    node.path("/root/bench.py").write_bytes(script.read_bytes())
    argv = [f"{ENVIRONMENT}/bin/python", "-I", "/root/bench.py", str(rounds), str(calls)]
    process = node.popen(argv, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=1800)
    if process.returncode:
        raise SystemExit("the bench's part on the node failed; what it said is above")
    samples = json.loads(out)
    for containers in (1, GROUP):
        samples[f"memory_{containers}"] = memory(node, containers)
    return samples


def memory(node: Node, containers: int) -> dict[str, list[int]]:
    """Bytes that the shims of one group of containers are charged with. Read from here: another
    Python on the node would share the daemon's pages, and its charge."""
    found = {}
    for runtime in ("io.containerd.grit.v1", "io.containerd.runc.v2"):
        names = [f"m{number}" for number in range(containers)]
        flags = ["--detach", "--annotation=io.containerd.runc.v2.group=bench"]
        for name in names:
            node.run_container(name, IMAGE, *SLEEP, flags=flags, runtime=runtime)
        (stock,) = node.pids("containerd-shim-runc-v2")
        if runtime == "io.containerd.grit.v1":
            (record,) = node.path("/run/containerd/grit").glob("*/processes")
            (outer,) = (
                line.split()[1] for line in record.read_text().splitlines() if line[:5] == "outer"
            )
            found["grit"] = [proportional(node, int(outer))]
            found["grit_inner"] = [proportional(node, stock)]
        else:
            found["stock"] = [proportional(node, stock)]
        for name in names:
            node.ctr("task", "rm", "--force", name)
            node.ctr("container", "rm", name)
        until("the shim's end", lambda: not node.pids("containerd-shim-runc-v2"))
    return found


def proportional(node: Node, pid: int) -> int:
    """Bytes, shared pages by their share (proc(5): smaps_rollup)."""
    lines = node.path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
