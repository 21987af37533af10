"""`python -m tests.bench`: what grit costs beside the stock shim and runc, on nodes of its own.
Takes some ten minutes, says what it is doing, and writes results, tables and plot into docs/;
figures are for reading, none makes it fail. With `--from FILE` it measures nothing and writes anew
what stands in that file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench import dumps, report, weight
from tests.nodes.image import build_image
from tests.nodes.installed import ENVIRONMENT, REPOSITORY, installed_node, refresh

if TYPE_CHECKING:
    from tests.nodes.node import Node

# Rounds of a checkpoint by its size in GiB: large ones vary little.
_ROUNDS = ((0.5, 9), (2.0, 5), (1e9, 3))


def main() -> None:
    options = _options()
    results = json.loads(options.read.read_text()) if options.read else measure(options)
    report.write(results, options.docs)
    print(report.markdown(results))
    written = ", ".join(f"{options.docs}/{name}" for name in (report.RESULTS, report.PAGE))
    print(f"written: {written}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.bench", description=__doc__)
    sizes: dict[str, Any] = {"nargs": "*", "metavar": "GIB"}
    parser.add_argument("--nodes", nargs="*", default=["13", "forky"], help="for the shim's weight")
    parser.add_argument("--rounds", type=int, default=25, help="of each kind but calls")
    parser.add_argument("--calls", type=int, default=1000, help="State calls of each kind")
    parser.add_argument("--sizes", default=["0.1", "1", "4"], help="of plain memory", **sizes)
    parser.add_argument("--gpu-sizes", default=["1", "4", "16"], help="of a GPU's", **sizes)
    parser.add_argument("--dumps", type=int, help="rounds of checkpoints of whatever size")
    parser.add_argument("--docs", type=Path, default=REPOSITORY / "docs", help="write here")
    parser.add_argument("--from", dest="read", type=Path, help="results to write anew")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    load = os.getloadavg()[0]
    results: dict[str, Any] = {"weight": {}, "plain": {}, "simulated_gpu": {}}
    for name in options.nodes:
        say(f"weight, node {name}")
        with installed_node(name) as node:
            refresh(node)
            node.start_containerd()
            node.import_image(build_image("local/busybox", "1", {}))
            samples = weight.measure(node, options.rounds, options.calls)
            results["weight"][name] = {"where": versions(node), "samples": samples}
    for part, node_name, act, sizes in (
        ("plain", "13", dumps.plain, options.sizes),
        # The stock path works with CRIU 4.2 only.
        ("simulated_gpu", "forky", dumps.simulated_gpu, options.gpu_sizes),
    ):
        for size in sizes:
            say(f"{part.replace('_', ' ')}, {size} GiB, node {node_name}")
            rounds = options.dumps or next(n for most, n in _ROUNDS if float(size) <= most)
            results[part][size] = act(node_name, int(float(size) * dumps.GIB), rounds)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = {"cpus": os.cpu_count(), "memory": memory, "kernel": os.uname().release}
    machine["load"] = [load, os.getloadavg()[0]]
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return {"date": date, "machine": machine, **results}


def say(text: str) -> None:
    print(f"{datetime.datetime.now(datetime.UTC):%H:%M:%S} {text}", flush=True)


def versions(node: Node) -> str:
    containerd = node.run(["containerd", "--version"]).stdout.split()[2]
    python = node.run([f"{ENVIRONMENT}/bin/python", "--version"]).stdout.strip()
    return f"containerd {containerd}, {python}"


if __name__ == "__main__":
    main()
