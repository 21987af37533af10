"""What a node and a shim's daemon hold: looked at after every round, compared with the beginning.

Two kinds of leak. What is counted (processes, mounts, sockets, directories, cgroups, files) must be
after each round what it was before the first. What breathes (memory, descriptors, threads of a
daemon that lives through all rounds) must not grow: the last quarter's median is held against
that of the second.
"""

from __future__ import annotations

import collections
import os
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.soak.box import BUNDLES, GROUPS

if TYPE_CHECKING:
    from tests.nodes.node import Node

GROWTH = {"pss_kib": 1024.0, "fds": 0.0, "threads": 0.0, "files": 3.0}
"""How much more there may be at the end than when all was warm. Each container has some files more
after a restore or a failed dump, so that their number goes up and down."""

ENOUGH = 100
"""Looks from which on growth is told from warming up."""

_PLACES = (GROUPS, BUNDLES, "/tmp", "/run/containerd/runc")


def holdings(node: Node) -> collections.Counter[str]:
    """All that could be left behind, counted; names that change with every task are cut."""
    now = node.leaks()
    found: collections.Counter[str] = collections.Counter()
    for line in now.processes:
        found[f"process {line.partition(' ')[2]}"] += 1
    for kind in ("mounts", "sockets", "directories", "cgroups"):
        for name in getattr(now, kind):
            found[f"{kind} {name}"] += 1
    return found


def files(node: Node) -> int:
    """How many there are where the shim may write, but for the containers' own."""
    count = 0
    for top in _PLACES:
        for _, directories, names in os.walk(node.path(top)):
            if "rootfs" in directories:
                directories.remove("rootfs")
            count += len(names)
    return count


@dataclass
class Daemon:
    """One daemon's figures, a sample each time it is looked at."""

    node: Node
    pid: int
    samples: dict[str, list[int]] = field(
        default_factory=lambda: {"pss_kib": [], "fds": [], "threads": []}
    )

    def look(self) -> None:
        """Raises FileNotFoundError if it lives no more."""
        process = self.node.path(f"/proc/{self.pid}")
        found = {
            "pss_kib": _figure(process / "smaps_rollup", "Pss:"),
            "fds": len(os.listdir(process / "fd")),
            "threads": _figure(process / "status", "Threads:"),
        }
        for key, value in found.items():
            self.samples[key].append(value)

    def leaks(self) -> list[str]:
        return [one for key, samples in self.samples.items() for one in grown(key, samples)]


def grown(what: str, samples: list[int]) -> list[str]:
    """A line if there was more of it in the end than when all was warm."""
    warm, last = _quarter(samples, 1), _quarter(samples, 3)
    if len(samples) < ENOUGH or last <= warm + GROWTH[what]:
        return []
    return [f"{what} grew from {warm:g} to {last:g}"]


def _quarter(samples: list[int], which: int) -> float:
    size = len(samples) // 4
    return statistics.median(samples[which * size : (which + 1) * size] or samples or [0])


def _figure(path: os.PathLike[str], key: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))
