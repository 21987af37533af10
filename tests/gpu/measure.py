"""What a checkpoint and a restore cost: phases from the manifest, the shim's log and the cgroup,
the application's pause from its own reports. Measures; judges nothing.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from shim import announced
from tests.gpu.job import Job

Row = dict[str, Any]
_PHASES = ("suspend", "lane_write", "freeze", "lane_check", "lane_drop", "dump", "checksums")
_FIELD = re.compile(r'([\w.]+)=(?:"((?:[^"\\]|\\.)*)"|(\S*))')


class Frozen(threading.Thread):
    """Watches a container's cgroup: `seconds` is how long it stood frozen, from the first moment to
    the last: where it is thawed in between, its threads are held by ptrace."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self._events = job.cgroup() / "cgroup.events"
        self._over = threading.Event()
        self.seconds = 0.0

    def run(self) -> None:
        since = 0.0
        while not self._over.wait(0.001):
            try:
                frozen = "frozen 1" in self._events.read_text()
            except OSError:  # the container has ended
                return
            if frozen:
                since = since or time.monotonic()
                self.seconds = time.monotonic() - since

    def __enter__(self) -> Frozen:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self.join()


def checkpoint(job: Job, images: str, *, announce: bool = False) -> Row:
    """Checkpoints a running job, which goes on; the figures of that. With `announce` the client
    says beforehand where to, as gritctl does."""
    begun, lines = time.monotonic(), len(job.lines())
    word = announced.announcing("default", job.name, images) if announce else nullcontext()
    with Frozen(job) as frozen, word:
        job.checkpoint(images)
        seconds = time.monotonic() - begun
        job.next()
    row = described(job.machine.path(images))
    thawed = logged(job.machine, "thawed", job.name)
    resumed = logged(job.machine, "GPU resumed", job.name)
    copied = row["device"] / 1e9
    return {
        **row,
        "checkpoint": seconds,
        "frozen": frozen.seconds,
        "lane_fill": number(
            logged(job.machine, "device memory filled in again", job.name), "seconds"
        ),
        "thaw": number(thawed, "seconds"),
        "restore": number(resumed, "restore"),
        "unlock": number(resumed, "unlock"),
        "pause": pause(job.lines()[max(lines - 1, 0) :]),
        "rate": copied / row["copy"] if row["copy"] else None,
    }


def restore(job: Job, images: str) -> Row:
    """Restores a job that is no more; the figures of that."""
    begun = time.monotonic()
    job.restore(images)
    row: Row = {"restored": time.monotonic() - begun}
    job.next()
    row["criu_restore"] = number(logged(job.machine, "restored", job.name), "seconds")
    filled = logged(job.machine, "device memory filled in", job.name)
    row["fill_after"] = number(filled, "seconds")
    given = logged(job.machine, "GPU restored", job.name)
    row["restore_after"] = number(given, "restore")
    row["unlock_after"] = number(given, "unlock")
    return row


def described(images: Path) -> Row:
    """What lies in an image directory: sizes, and what its manifest says of it."""
    manifest = json.loads((images / "grit.json").read_text())
    files = {file.name: file.stat().st_size for file in images.iterdir()}
    biggest = max(files, key=lambda name: files[name])
    processes = manifest["cuda_processes"]
    steps = [process["steps"] for process in processes]
    phases = manifest["phases"]
    return {
        "criu": manifest["criu"],
        "driver": manifest["driver"],
        "gpu": ", ".join(gpu["name"] for gpu in manifest["gpus"]),
        "engine": manifest["engine"],
        "cuda": len(processes),
        "device": sum(process["device_bytes"] for process in processes),
        "lock": longest(steps, "lock"),
        "copy": longest(steps, "checkpoint"),
        **{name: phases.get(name) for name in _PHASES},
        "files": len(files),
        "bytes": sum(files.values()),
        "biggest": biggest,
        "biggest_bytes": files[biggest],
    }


def longest(steps: list[dict[str, dict[str, float]]], name: str) -> float | None:
    """Seconds of a step in the slowest of the processes; None where it was not taken."""
    return max((step[name]["seconds"] for step in steps if name in step), default=None)


def pause(lines: list[dict[str, Any]]) -> float:
    """The longest time between two reports, in seconds."""
    return max((b["time"] - a["time"] for a, b in itertools.pairwise(lines)), default=0)


def logged(machine: Any, message: str, name: str) -> dict[str, str]:
    """The fields of the last line that the shim has logged with this message about a job."""
    for line in reversed(machine.log().splitlines()):
        fields = {key: quoted or plain for key, quoted, plain in _FIELD.findall(line)}
        if (fields.get("msg"), fields.get("id")) == (message, name):
            return fields
    return {}


def number(fields: dict[str, str], name: str) -> float | None:
    return float(fields[name]) if name in fields else None
