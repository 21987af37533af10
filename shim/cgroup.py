"""A container's control group as a list of processes, on cgroup v1 and v2 alike. Reads files
only, so it works while the inner shim or runc is busy or gone."""

from __future__ import annotations

import os


def processes(path: str) -> list[int]:
    """The pids of every process in the group and the groups below it, as we see them (also
    those in pid namespaces of their own). Empty if the group is gone."""
    pids = []
    for folder, _, _ in os.walk(path):
        try:
            with open(os.path.join(folder, "cgroup.procs"), encoding="ascii") as file:
                pids += [int(line) for line in file]
        except OSError:
            continue  # the group went meanwhile, or is threaded
    return [pid for pid in pids if pid]  # 0 is a process outside our pid namespace
