"""`python -m tests.bench [--node 13|forky] [--rounds N] [--json FILE]`: what grit costs beside the
stock shim, on a node of its own. Prints a table of medians; figures are for reading, none makes it
fail. `inside.py` is the part that measures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e.gpu import IMAGE, until
from tests.nodes.image import build_image
from tests.nodes.installed import ENVIRONMENT, installed_node, refresh

if TYPE_CHECKING:
    from tests.nodes.node import Node

SLEEP = ("/bin/sh", "-c", "while :; do sleep 1000; done")
FIGURES = {
    "run_detached": "ctr run -d, to the running container",
    "run_to_end": "ctr run --rm, /bin/true, to its end",
    "state": "State call",
    "delete": "the shim's delete command",
    "checkpoint": "checkpoint without a GPU: Pause, Checkpoint, Resume",
    "memory_1": "memory (PSS) of the shim's daemon, 1 container",
    "memory_10": "memory (PSS) of the shim's daemon, 10 containers in its group",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    parser.add_argument("--node", choices=["13", "forky"], default="13")
    parser.add_argument("--rounds", type=int, default=25, help="of each kind but calls")
    parser.add_argument("--calls", type=int, default=3000, help="State calls of each kind")
    parser.add_argument("--json", type=Path, help="write the samples to this file as well")
    options = parser.parse_args()
    with installed_node(options.node) as node:
        refresh(node)
        node.start_containerd()
        node.import_image(build_image("local/busybox", "1", {}))
        where = describe(node)
        print(where, flush=True)
        samples = measure(node, options.rounds, options.calls)
        for containers in (1, 10):
            samples[f"memory_{containers}"] = memory(node, containers)
    print()
    for line in table(samples):
        print(line)
    print()
    for line in aims(samples):
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"where": where, "samples": samples}) + "\n")


def describe(node: Node) -> str:
    """When and where, and what else the machine was doing."""
    containerd = node.run(["containerd", "--version"]).stdout.split()[2]
    python = node.run([f"{ENVIRONMENT}/bin/python", "--version"]).stdout.strip()
    load = os.getloadavg()[0]
    return (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {os.cpu_count()} CPUs, "
        f"Linux {os.uname().release}, load before {load:.1f}; containerd {containerd}, {python}"
    )


def measure(node: Node, rounds: int, calls: int) -> Any:
    script = Path(__file__).with_name("inside.py")
    node.path("/root/bench.py").write_bytes(script.read_bytes())
    python = f"{ENVIRONMENT}/bin/python"
    argv = [python, "-I", "/root/bench.py", str(rounds), str(calls)]
    return json.loads(node.run(argv, timeout=600).stdout)


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


def table(samples: Any) -> list[str]:
    lines = [f"{'median':62}{'stock':>12}{'grit':>12}{'ratio':>8}", "-" * 94]
    for figure, title in FIGURES.items():
        stock, grit = (statistics.median(samples[figure][name]) for name in ("stock", "grit"))
        unit = shown_bytes if figure.startswith("memory") else shown_seconds
        lines.append(f"{title:62}{unit(stock):>12}{unit(grit):>12}{grit / stock:>8.2f}")
    inner = samples["memory_1"]["grit_inner"][0], samples["memory_10"]["grit_inner"][0]
    under = " and ".join(map(shown_bytes, inner))
    lines.append(f"(grit has a stock shim under it: {under} with 1 and 10 containers)")
    return lines


def aims(samples: Any) -> list[str]:
    """What issue and documentation aim at, and what came of it."""

    def median(figure: str, name: str) -> float:
        return float(statistics.median(samples[figure][name]))

    start = median("run_detached", "grit") / median("run_detached", "stock")
    added = (median("state", "grit") - median("state", "stock")) * 1e3
    held = median("memory_10", "grit") / (1 << 20)
    rows = [
        ("start beside the stock shim", f"{start:.2f}x", "2x", start <= 2),
        ("added to a State call", f"{added:.3f} ms", "0.3 ms", added <= 0.3),
        ("memory with 10 containers", f"{held:.1f} MiB", "25 MiB", held <= 25),
    ]
    return [
        f"{what:32}{value:>12}   aim: at most {aim:8}{'reached' if true else 'missed'}"
        for what, value, aim, true in rows
    ]


def shown_seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value >= 0.002 else f"{value * 1e3:.3f} ms"


def shown_bytes(value: float) -> str:
    return f"{value / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    main()
