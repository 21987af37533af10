"""`make soak`: for some rounds or some time, containers under load are checkpointed, restored,
paused, killed, and broken at random, on a node of its own. After each round every tick that the
workloads have counted is checked, and what the node holds is compared with the beginning. Ends with
a summary, as text and as JSON, and with status 1 for a mismatch or a leak.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import random
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import Job, configure, until
from tests.soak import watch
from tests.soak.acts import ACTS, KEEPING_THE_SHIM, PLACE
from tests.soak.box import SMALL, Box, clear, connect, pattern

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node

_ABREAST = 2
"""Rounds at the same time, each with a container of its own."""

_WORDS = {
    "steady": ("--kind", "ctx"),
    "driver": ("--kind", "ctx"),
    "plugin": ("--kind", "ctx"),
    "cpu": ("--kind", "cpu"),
}
"""The containers: `steady` keeps its shim through all rounds, so that one is seen to grow; `plugin`
has its device memory copied by CRIU's plugin; `cpu` has no GPU."""


def main() -> int:
    options = _options()
    with _place(options.node) as (node, boxes):
        soak = Soak(node, boxes, options.seed)
        print(f"seed {options.seed}, node {options.node}, {len(boxes)} containers", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            soak.run(options.rounds, options.seconds)
        found = soak.summary()
    print(text(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["mismatches"] or found["leaks"] else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="0 for no end but that of time")
    parser.add_argument("--seconds", type=float, default=0, help="0 for no end but that of rounds")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--node", default="forky", help="a node that can checkpoint")
    parser.add_argument("--json", type=Path, help="the summary's file")
    found = parser.parse_args()
    if not found.rounds and not found.seconds:
        parser.error("give --rounds or --seconds")
    return found


@contextlib.contextmanager
def _place(name: str) -> Iterator[tuple[Node, list[Box]]]:
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(name, binds=gpu.kit_binds(), env=env) as node:
        board = gpu.gpu_of(node, capacity=16 << 20)
        with connect(node) as containerd:
            boxes = []
            for box, words in _WORDS.items():
                configure(
                    node,
                    engine="plugin" if box == "plugin" else "driver",
                    lane_from=4096,  # bytes: what they hold goes past CRIU, but for the plugin's
                )
                config = f"/etc/containerd/soak-{box}.toml"
                node.path(config).write_text(node.path(gpu.CONFIG).read_text())
                job = Job(node, board, box, *words, *SMALL, runtime=gpu.GRIT)
                boxes.append(Box(node, containerd, box, *pattern(job, containerd), config))
            yield node, boxes


class Soak:
    def __init__(self, node: Node, boxes: list[Box], seed: int) -> None:
        self.node = node
        self.boxes = {box.name: box for box in boxes}
        self.chance = random.Random(seed)
        self.seed = seed
        self.rounds = 0
        self.seconds: dict[str, list[float]] = {name: [] for name in ACTS}
        self.outcomes: dict[str, dict[str, int]] = {name: {} for name in ACTS}
        self.mismatches: list[str] = []
        self.leaks: list[str] = []
        self.files: list[int] = []
        for box in boxes:
            box.start()
            box.check()
        self.steady = watch.Daemon(node, self.boxes["steady"].shims()["outer"])
        self.others: list[int] = []
        self.before = self._warm()
        self.began = time.monotonic()
        self.ended = self.began

    def run(self, rounds: int, seconds: float) -> None:
        with concurrent.futures.ThreadPoolExecutor(_ABREAST) as pool:
            while (not rounds or self.rounds < rounds) and (
                not seconds or time.monotonic() - self.began < seconds
            ):
                chosen = self.chance.sample(sorted(self.boxes), min(_ABREAST, len(self.boxes)))
                wanted = [self._draw(name) for name in chosen]
                list(pool.map(lambda one: self._round(*one), wanted))
                self.rounds += len(wanted)
                self._look()
                self.ended = time.monotonic()
                if self.rounds % 100 < _ABREAST:
                    self._say()
        for box in self.boxes.values():
            self._guarded(f"the end of {box.name}", box.check)

    def _warm(self) -> Any:
        """A first checkpoint leaves what every container keeps from then on (CRIU's log)."""
        for box in self.boxes.values():
            ACTS["checkpoint"][1](box, random.Random(0))
            box.check()
            clear(self.node, f"{PLACE}/{box.name}")
        return watch.holdings(self.node)

    def _draw(self, name: str) -> tuple[Box, str, random.Random]:
        names = KEEPING_THE_SHIM if name == "steady" else tuple(ACTS)
        (act,) = self.chance.choices(names, [ACTS[one][0] for one in names])
        return self.boxes[name], act, random.Random(self.chance.random())

    def _round(self, box: Box, name: str, chance: random.Random) -> None:
        began = time.monotonic()

        def act() -> None:
            outcome = ACTS[name][1](box, chance)
            self.seconds[name].append(time.monotonic() - began)
            counts = self.outcomes[name]
            counts[outcome] = counts.get(outcome, 0) + 1
            box.check()
            clear(self.node, f"{PLACE}/{box.name}")

        if not self._guarded(f"round {self.rounds}, {box.name}, {name}", act):
            box.remove()
            clear(self.node, f"{PLACE}/{box.name}")
            if not self._guarded(f"round {self.rounds}, {box.name}, a new start", box.start):
                del self.boxes[box.name]
                return
            if box.name == "steady":
                self.steady = watch.Daemon(self.node, box.shims()["outer"])

    def _guarded(self, what: str, act: Any) -> bool:
        try:
            act()
        except Exception as error:
            self.mismatches.append(f"{what}: {error!r}")
            print(f"MISMATCH {self.mismatches[-1]}", flush=True)
            traceback.print_exc(file=sys.stdout)
            print("\n".join(self.node.containerd_log().splitlines()[-60:]), flush=True)
            return False
        return True

    def _look(self) -> None:
        self.steady.look()
        self.files.append(watch.files(self.node))
        # What has just ended may take a moment to be gone.
        try:
            until("an end without leaks", lambda: watch.holdings(self.node) == self.before, 10)
        except AssertionError:
            now = watch.holdings(self.node)
            more = {key: now[key] - self.before[key] for key in now | self.before}
            self.leaks.append(f"round {self.rounds}: { ({k: n for k, n in more.items() if n}) }")
            print(f"LEAK {self.leaks[-1]}", flush=True)
            self.before = now  # told once

    def _say(self) -> None:
        latest = {key: samples[-1] for key, samples in self.steady.samples.items()}
        print(
            f"{self.rounds} rounds, {self.ended - self.began:.0f} s, {len(self.mismatches)} "
            f"mismatches, {len(self.leaks)} leaks, {latest}, {self.files[-1]} files",
            flush=True,
        )

    def summary(self) -> dict[str, Any]:
        leaks = [*self.leaks, *self.steady.leaks(), *watch.grown("files", self.files)]
        return {
            "seed": self.seed,
            "node": self.node.name,
            "rounds": self.rounds,
            "seconds": round(self.ended - self.began),
            "ticks_checked": sum(box.lines for box in self.boxes.values()),
            "mismatches": self.mismatches,
            "leaks": leaks,
            "acts": {
                name: {
                    "rounds": len(taken),
                    "outcomes": self.outcomes[name],
                    "median_s_first_half": _median(taken[: len(taken) // 2]),
                    "median_s_second_half": _median(taken[len(taken) // 2 :]),
                    "longest_s": round(max(taken, default=0), 3),
                }
                for name, taken in self.seconds.items()
            },
            "daemon": {
                key: {
                    "first": samples[0] if samples else 0,
                    "last": samples[-1] if samples else 0,
                    "most": max(samples, default=0),
                }
                for key, samples in self.steady.samples.items()
            },
            "files": {
                "first": self.files[:1],
                "last": self.files[-1:],
                "most": max(self.files, default=0),
            },
            "load": os.getloadavg(),
        }


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3) if values else 0.0


def text(found: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = [
        f"{found['rounds']} rounds in {found['seconds']} s on node {found['node']}, seed "
        f"{found['seed']}: {found['ticks_checked']} ticks checked, {len(found['mismatches'])} "
        f"mismatches, {len(found['leaks'])} leaks",
        "",
        "| what | rounds | median, first half | second half | longest | how it ended |",
        "|---|---|---|---|---|---|",
    ]
    for name, act in found["acts"].items():
        ends = ", ".join(f"{end or 'well'}: {n}" for end, n in sorted(act["outcomes"].items()))
        lines.append(
            f"| {name} | {act['rounds']} | {act['median_s_first_half']:.2f} s | "
            f"{act['median_s_second_half']:.2f} s | {act['longest_s']:.2f} s | {ends} |"
        )
    lines += [
        "",
        "| the daemon that lived through all rounds | first | last | most |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {key} | {one['first']} | {one['last']} | {one['most']} |"
        for key, one in found["daemon"].items()
    ]
    lines += ["", *(f"mismatch: {one}" for one in found["mismatches"])]
    lines += [f"leak: {one}" for one in found["leaks"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
