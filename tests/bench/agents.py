"""`python -m tests.bench.agents`: many Checkpoints of a few pods on two nodes, all asked for at
once. Prints the rate, what the agents asked of the API server, what they hold before and after, and
what was left behind: for docs/kubernetes.md. Takes some minutes.
"""

from __future__ import annotations

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.weight import proportional
from tests.e2e.kube.control_plane import ControlPlane
from tests.e2e.kube.workers import CLAIM, Worker, two
from tests.e2e.pods.kubelet import NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.nodes.node import Snapshot

# A sleep that CRIU has dumped returns early, which busybox's `sleep` takes for its end.
SLEEP = ("tail", "-f", "/dev/null")
Left = dict[str, list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.agents", description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=200)
    parser.add_argument("--pods", type=int, default=20, help="half of them on each node")
    parser.add_argument("--rounds", type=int, default=1, help="each after all of the last are gone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as store, ControlPlane() as plane:
        plane.apply_packaged()
        with two(plane, Path(store), "") as workers:
            begin(workers, options.pods)
            found: dict[str, Any] = {
                "rounds": [
                    measure(plane, workers, options.checkpoints, options.pods)
                    for _ in range(options.rounds)
                ]
            }
            found["store"] = [str(one) for one in Path(store).glob("*/*")]
    print(json.dumps(found, indent=2))


def begin(workers: Sequence[Worker], pods: int) -> None:
    for number in range(pods):
        workers[number % 2].kubelet.pod(f"pod-{number}", {"main": SLEEP}).run()


def measure(
    plane: ControlPlane, workers: Sequence[Worker], checkpoints: int, pods: int
) -> dict[str, Any]:
    """Figures by name: seconds, bytes, counts. What was left behind is a list, empty if all is
    well."""
    start = [held(worker) for worker in workers]
    before = [(worker.node.leaks(), leases(worker)) for worker in workers]
    asked = len(plane.audit())

    began = time.monotonic()
    plane.apply(manifests(checkpoints, pods), timeout=600)
    every = ("wait", "--for=jsonpath={.status.phase}=Checkpointed", "checkpoint", "--all")
    plane.kubectl(*every, "--timeout=1500s", timeout=1600)
    seconds = time.monotonic() - began
    calls = collections.Counter(map(call, plane.audit()[asked:]))
    end = [held(worker) for worker in workers]
    plane.kubectl("delete", "checkpoint", "--all", "--timeout=600s", timeout=700)
    return {
        "checkpoints": checkpoints,
        "pods": pods,
        "seconds": round(seconds, 1),
        "per_second": round(checkpoints / seconds, 2),
        "calls": dict(sorted(calls.items())),
        "calls_per_checkpoint": round(calls.total() / checkpoints, 1),
        "agents": [{"start": a, "end": b} for a, b in zip(start, end, strict=True)],
        "agents_after_delete": [held(worker) for worker in workers],
        "left": [left(one, was) for one, was in zip(workers, before, strict=True)],
    }


def manifests(checkpoints: int, pods: int) -> str:
    every = [
        {
            "apiVersion": "kaito.sh/v1alpha1",
            "kind": "Checkpoint",
            "metadata": {"name": f"c-{number}", "namespace": "default"},
            "spec": {"podName": f"pod-{number % pods}", "volumeClaim": {"claimName": CLAIM}},
        }
        for number in range(checkpoints)
    ]
    return "\n---\n".join(map(json.dumps, every))


def call(event: dict[str, Any]) -> str:
    """The verb, and the status if it is that which was written."""
    part = event["objectRef"].get("subresource", "")
    return f"{event['verb']} {part}".strip()


def held(worker: Worker) -> dict[str, int]:
    """What the agent holds: bytes of memory (PSS), descriptors, threads."""
    pid = worker.agent_pid()
    process = worker.node.path(f"/proc/{pid}")
    return {
        "memory": proportional(worker.node, pid),
        "descriptors": len(list((process / "fd").iterdir())),
        "threads": len(list((process / "task").iterdir())),
    }


def leases(worker: Worker) -> set[str]:
    """containerd's; of 2.x, CRI has one for each pod."""
    return set(worker.node.ctr("-n", NAMESPACE, "leases", "ls", "-q").stdout.split())


def left(worker: Worker, before: tuple[Snapshot, set[str]]) -> Left:
    """What is there that was not, and tasks that do not run."""
    node = worker.node
    now = node.leaks() - before[0]
    tasks = node.ctr("-n", NAMESPACE, "task", "ls").stdout.splitlines()[1:]
    snapshots = node.ctr("-n", NAMESPACE, "snapshots", "ls").stdout.splitlines()
    return {
        **{kind: sorted(entries) for kind, entries in vars(now).items()},
        "tasks": [line for line in tasks if line.split()[2] != "RUNNING"],
        "leases": sorted(leases(worker) - before[1]),
        "snapshots": [line for line in snapshots if line.startswith("gritctl-")],
    }


if __name__ == "__main__":
    main()
