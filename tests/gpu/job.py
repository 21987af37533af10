"""A container under `ctr` whose program reports in JSON lines, one file for each of its processes,
in a directory that it shares with the test. Each line has at least `counter` and `time` (seconds,
time.time()). The machine may be the real one or a node with a simulated GPU.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

IMAGE = "docker.io/local/busybox:1"
GRIT = "io.containerd.grit.v1"
SHARED = "/job"

T = TypeVar("T")
Line = dict[str, Any]


def until(what: str, probe: Callable[[], T], seconds: float = 60.0, every: float = 0.01) -> T:
    """The first true answer of `probe`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)
    return answer


TENSORS = ("sum", "ballast", "cpu")


def same(before: Line, after: Line, names: Sequence[str] = TENSORS) -> None:
    """Two reports, of hold.py unless there are other `names`: the same tensors, on the GPU and off
    it, further on."""
    assert after["counter"] > before["counter"]
    for name in names:
        assert after[name] == before[name], name


def reports(file: Path) -> list[Line]:
    """All complete ones of a workload, oldest first; empty while there is none."""
    try:
        text = file.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]


class Job:
    """One container from its start to its removal, checkpoints and restores in between."""

    def __init__(
        self,
        machine: Any,
        name: str,
        argv: Sequence[str],
        *,
        shared: str,
        flags: Sequence[str],
    ) -> None:
        """`shared` is a directory of the machine, SHARED in the container; `flags` are those of
        `ctr run` that every start of this container has."""
        self.machine = machine
        self.name = name
        self.argv = list(argv)
        self.shared: Path = machine.path(shared)
        mount = f"--mount=type=bind,src={shared},dst={SHARED},options=rbind:rw"
        self.flags = [*flags, mount]

    # --- its life -------------------------------------------------------------------------

    def run(self, *flags: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`ctr run -d`."""
        words = ["run", "-d", "--runtime", GRIT, *self.flags, *flags, IMAGE, self.name, *self.argv]
        return self._ctr(*words, check=check)

    def restore(self, images: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """A new container by the annotation `grit.dev/checkpoint`."""
        return self.run(f"--annotation=grit.dev/checkpoint={Path(images).parent}", check=check)

    def checkpoint_words(self, images: str) -> list[str]:
        """CRIU's log and statistics go to `<images>.work`."""
        places = ["--image-path", images, "--work-path", f"{images}.work"]
        return ["task", "checkpoint", *places, self.name]

    def checkpoint(
        self, images: str, *flags: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        *words, name = self.checkpoint_words(images)
        return self._ctr(*words, *flags, name, check=check)

    def _ctr(self, *words: str, check: bool) -> subprocess.CompletedProcess[str]:
        done: subprocess.CompletedProcess[str] = self.machine.ctr(*words, check=check, timeout=300)
        return done

    def save_rootfs(self, images: str) -> None:
        """What the container has changed in its root file system, where GRIT's agent saves it."""
        tar = Path(images).with_name("rootfs-diff.tar")
        words = shlex.join(self.machine.ctr_words("snapshots", "diff", self.name))
        self.machine.run(["sh", "-c", f"{words} > {tar}"])

    def end(self) -> None:
        """Kills and removes whatever there is of it."""
        self.machine.ctr("task", "kill", "--signal", "SIGKILL", self.name, check=False)
        alive = ("RUNNING", "PAUSED", "PAUSING")  # a restore that failed leaves CREATED
        until(f"end of {self.name}", lambda: self.status() not in alive, every=0.05)
        self.machine.ctr("task", "delete", "--force", self.name, check=False)
        self.machine.ctr("container", "delete", self.name, check=False)

    # --- what it says -----------------------------------------------------------------------

    def lines(self, name: str = "status") -> list[Line]:
        """All complete reports, oldest first; empty while there is none."""
        return reports(self.shared / name)

    def next(self, count: int = 3, name: str = "status", seconds: float = 60) -> Line:
        """The last of `count` reports that come from now on."""
        wanted = len(self.lines(name)) + count

        def there() -> list[Line]:
            lines = self.lines(name)
            return lines if len(lines) >= wanted or self.status() in ("STOPPED", "") else []

        lines = until(f"reports of {self.name} in {name}", there, seconds, every=0.05)
        assert len(lines) >= wanted, f"{self.name} ended: {lines[-1:]}"
        return lines[-1]

    # --- its processes ------------------------------------------------------------------------

    def status(self) -> str:
        """RUNNING, PAUSED, STOPPED, or "" without a task."""
        return self._task()[2] if self._task() else ""

    def pid(self) -> int:
        """The container's first process, as the machine counts."""
        return int(self._task()[1])

    def _task(self) -> list[str]:
        lines = self.machine.ctr("task", "ls").stdout.splitlines()[1:]
        return next((line.split() for line in lines if line.split()[0] == self.name), [])

    def cgroup(self) -> Path:
        """The container's directory in the cgroup v2 tree."""
        own = self.machine.run(["cat", f"/proc/{self.pid()}/cgroup"]).stdout.splitlines()
        (path,) = (line.removeprefix("0::") for line in own if line.startswith("0::"))
        directory: Path = self.machine.path("/sys/fs/cgroup" + path)
        return directory

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.cgroup() / "cgroup.procs").read_text().split()]
