"""A container with a simulated GPU under a real containerd, as `ctr` starts one, and what its
workload says of itself. The tests' words for "the job goes on": counter, CPU memory, file and
device memory tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.simgpu.simgpu import KIT, WORKLOAD, Report, SimGpu, build, default_cache, reports

if TYPE_CHECKING:
    import subprocess

    from tests.nodes.node import Node

IMAGE = "docker.io/local/busybox:1"
GRIT = "io.containerd.grit.v1"
STOCK = "io.containerd.runc.v2"
STATUS = "/status"
CONFIG = "/etc/containerd/grit.toml"

T = TypeVar("T")


def kit_binds() -> dict[str, Path]:
    """What a node needs bound for its containers to find the simulated GPU's library."""
    return {KIT: build(default_cache()).root}


def gpu_of(node: Node, **options: Any) -> SimGpu:
    """The node's GPUs, made now; its own libcuda is where a node's driver has it."""
    gpu = SimGpu.in_node(node, build(default_cache()), **options).create()
    library = node.path("/usr/lib/x86_64-linux-gnu/libcuda.so.1")
    if not library.exists():
        library.symlink_to(f"{KIT}/lib/libcuda.so.1")
    for number in range(gpu.gpus):
        device = node.path(f"/dev/nvidia{number}")
        if not device.exists():
            os.mknod(device, 0o666 | 0o020000, gpu.device.st_rdev)
    return gpu


def configure(node: Node, text: str = "") -> None:
    """Writes the node's grit.toml; `text` is what stands under [grit]."""
    node.path(CONFIG).write_text(f"[grit]\n{text}\n")


def until(what: str, probe: Callable[[], T], seconds: float = 30.0) -> T:
    """The first true answer of `probe`; AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := probe()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.01)
    return answer


class Job:
    """One container running the workload under `ctr`, from its start to its removal."""

    def __init__(
        self,
        node: Node,
        gpu: SimGpu,
        name: str,
        *words: str,
        runtime: str = GRIT,
        options: Sequence[str] = (),
    ) -> None:
        self.node = node
        self.gpu = gpu
        self.name = name
        self.runtime = runtime
        # ctr 1.7 restores only containers that have runtime options.
        self.options = [f"--runtime-config-path={CONFIG}"] if runtime == GRIT else []
        self.options += options
        self.words = [WORKLOAD, "--tick-ms", "10", "--status", STATUS, "--token-file", "/token"]
        self.words += words

    def run(self) -> Job:
        """`ctr run -d`, and the first report."""
        devices = [f"--device=/dev/nvidia{number}" for number in range(self.gpu.gpus)]
        mounts = [
            f"--mount=type=bind,src={mount['source']},dst={mount['destination']},"
            f"options={':'.join(mount['options'])}"
            for mount in self.gpu.container_mounts()
        ]
        env = [f"--env={entry}" for entry in self.gpu.container_env()]
        self.node.ctr(
            "run",
            "-d",
            "--runtime",
            self.runtime,
            *self.options,
            *devices,
            *mounts,
            *env,
            IMAGE,
            self.name,
            *self.words,
        )
        self.next_report()
        return self

    def pid(self) -> int:
        """The container's init on the host; AssertionError if it has no task."""
        for line in self.node.ctr("task", "ls").stdout.splitlines()[1:]:
            name, pid, _ = line.split()
            if name == self.name:
                return self.node.host_pid(int(pid))
        raise AssertionError(f"no task {self.name}")

    def status(self) -> str:
        """RUNNING, PAUSED, STOPPED, or "" without a task."""
        for line in self.node.ctr("task", "ls").stdout.splitlines()[1:]:
            name, _, status = line.split()
            if name == self.name:
                return status
        return ""

    def rootfs(self) -> Path:
        return self.node.path(
            f"/run/containerd/io.containerd.runtime.v2.task/default/{self.name}/rootfs"
        )

    def reports(self, status: str = STATUS) -> list[Report]:
        return reports(self.rootfs() / status.lstrip("/"))

    def next_report(self) -> Report:
        """One that was begun and ended after this call."""
        before = len(self.reports())
        until(f"report of {self.name}", lambda: len(self.reports()) >= before + 2)
        last = self.reports()[-1]
        assert last.ok, last
        return last

    def ctr(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.node.ctr(*words, check=check, timeout=120)

    def checkpoint_container(self, reference: str) -> None:
        """`ctr container checkpoint --rw --task --image`. containerd 1.7 stores the options' blob
        once and then leaves the task out of every further checkpoint, without a word, so
        checkpoints made before must be gone."""
        for line in self.ctr("images", "ls", "-q").stdout.split():
            if line != IMAGE:
                self.ctr("images", "rm", "--sync", line)
        self.ctr("container", "checkpoint", "--rw", "--task", "--image", self.name, reference)

    def restore_container(self, reference: str) -> Job:
        """`ctr container restore --live --rw` under the same name."""
        self.ctr("container", "restore", "--live", "--rw", self.name, reference)
        return self

    def end(self) -> None:
        """Kills and removes whatever there is of it."""
        self.ctr("task", "kill", "--signal", "SIGKILL", self.name, check=False)
        until("the task's end", lambda: self.status() in ("STOPPED", ""))
        self.ctr("task", "delete", self.name, check=False)
        self.ctr("container", "delete", self.name, check=False)


def go_on(before: Report, after: Report) -> None:
    """What every test of a checkpoint comes down to: the same job, further on."""
    assert after.counter > before.counter
    assert (after.device, after.cpu, after.file) == (before.device, before.cpu, before.file)
    assert after.ok
