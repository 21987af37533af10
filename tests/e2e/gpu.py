"""A container with a simulated GPU under a real containerd, as `ctr` starts one, and what its
workload says of itself. The tests' words for "the job goes on": counter, CPU memory, file and
device memory tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tests.nodes.installed import CUDA_PLUGIN, SHIM
from tests.nodes.node import ENVIRONMENT
from tests.simgpu.simgpu import KIT, WORKLOAD, Report, SimGpu, build, default_cache, reports

if TYPE_CHECKING:
    from tests.nodes.node import Node, Process

IMAGE = "docker.io/local/busybox:1"
GRIT = "io.containerd.grit.v1"
STOCK = "io.containerd.runc.v2"
STATUS = "/status"
CONFIG = "/etc/containerd/grit.toml"
LIBRARIES = "/usr/lib/x86_64-linux-gnu"
GRIT_AS_RUNC = "/opt/grit-as-runc"
"""A directory in which grit goes by the stock shim's name: containerd 1.7 and its ctr do some
things (image and work path, --exit) for that name only."""

NO_GPU_CHECK = {"CRIU_FAULT": "138"}
"""CRIU's own switch: its CUDA plugin runs where there is no NVIDIA driver."""

FAILPOINTS = "/run/grit-failpoints"
"""Where the shims look for what a test has them do: shim/failpoint.py."""

ENVIRONMENT_OF_GRIT = {
    **NO_GPU_CHECK,
    "PATH": f"{GRIT_AS_RUNC}:{ENVIRONMENT['PATH']}",
    "GRIT_FAILPOINTS": FAILPOINTS,
}

ON_A_TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))
"""

T = TypeVar("T")


def kit_binds() -> dict[str, Path]:
    """What a node needs bound for its containers to find the simulated GPU's library."""
    return {KIT: build(default_cache()).root}


def gpu_of(node: Node, **options: Any) -> SimGpu:
    """The node's GPUs, made now; its own libcuda and NVML are where a node's driver has them."""
    gpu = SimGpu.in_node(node, build(default_cache()), **options).create()
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        library = node.path(f"{LIBRARIES}/{name}")
        if not library.is_symlink():
            library.symlink_to(f"{KIT}/lib/{name}")
    for number in range(gpu.gpus):
        device = node.path(f"/dev/nvidia{number}")
        if not device.exists():
            os.mknod(device, 0o666 | 0o020000, gpu.device.st_rdev)
    return gpu


def configure(node: Node, runtime: str = "", **settings: Any) -> None:
    """Writes the node's grit.toml, with `settings` under [grit] and another `runtime` than runc.
    CRIU's CUDA plugin is named in any case, so that the plugin engine can be asked for."""
    settings = {"plugin_dir": CUDA_PLUGIN, **settings}
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    binary = f"BinaryName = {json.dumps(runtime)}\n" if runtime else ""
    node.path(CONFIG).write_text(f"{binary}[grit]\n" + "".join(lines))


KERNEL_DRIVER = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(b"tmpfs", b"/proc/driver", b"tmpfs", 0, b"mode=0755"):
    sys.exit(os.strerror(ctypes.get_errno()))
os.makedirs("/proc/driver/nvidia/gpus")
version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Release Build\\n"
open("/proc/driver/nvidia/version", "w").write(version)
for number, gpu in enumerate(sys.argv[1:]):
    uuid, name = gpu.split(" ", 1)
    directory = f"/proc/driver/nvidia/gpus/0000:{number:02x}:00.0"
    os.mkdir(directory)
    with open(f"{directory}/information", "w") as file:
        file.write(f"Model: \\t\\t {name}\\nGPU UUID: \\t {uuid}\\nDevice Minor: \\t {number}\\n")
"""


def kernel_driver(node: Node, *names: str) -> None:
    """Gives the node a /proc/driver/nvidia, with GPUs of these types."""
    gpus = [f"{uuid(number)} {name}" for number, name in enumerate(names)]
    node.run(["python3", "-c", KERNEL_DRIVER, *gpus])


def uuid(number: int) -> str:
    """A simulated GPU's, as NVIDIA writes it."""
    return f"GPU-{SimGpu.uuid(number)}"


def grit_as_runc(node: Node) -> None:
    """Under `ENVIRONMENT_OF_GRIT`, containerd starts grit for the runtime io.containerd.runc.v2."""
    link = node.path(f"{GRIT_AS_RUNC}/containerd-shim-runc-v2")
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(SHIM)


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
        gpus: Sequence[int] | None = None,
    ) -> None:
        """`words` are the workload's options, `options` those of `ctr run`; `gpus` are given by
        `--device`, None for all of the node's."""
        self.node = node
        self.gpu = gpu
        self.name = name
        self.runtime = runtime
        self.gpus = range(gpu.gpus) if gpus is None else gpus
        # ctr 1.7 restores only containers that have runtime options.
        self.options = [f"--runtime-config-path={CONFIG}"] if runtime == GRIT else []
        self.options += options
        self.words = [WORKLOAD, "--tick-ms", "10", "--status", STATUS, "--token-file", "/token"]
        self.words += words

    def run(self) -> Job:
        """`ctr run -d`, and the first report."""
        done = self.try_run()
        assert done.returncode == 0, done.stderr
        self.next_report()
        return self

    def try_run(self) -> subprocess.CompletedProcess[str]:
        """`ctr run -d`, whatever comes of it."""
        devices = [f"--device=/dev/nvidia{number}" for number in self.gpus]
        mounts = [
            f"--mount=type=bind,src={mount['source']},dst={mount['destination']},"
            f"options={':'.join(mount['options'])}"
            for mount in self.gpu.container_mounts()
        ]
        env = [f"--env={entry}" for entry in self.gpu.container_env()]
        flags = ["-d", *devices, *mounts, *env, *self.options]
        if "--tty" in flags:  # ctr wants to see one itself
            words = ["ctr", "run", "--runtime", self.runtime, "--cpu-shares=0", *flags]
            argv = ["python3", "-c", ON_A_TERMINAL, *words, IMAGE, self.name, *self.words]
            return self.node.run(argv, check=False)
        return self.node.run_container(
            self.name, IMAGE, *self.words, flags=flags, runtime=self.runtime, check=False
        )

    def pid(self) -> int:
        """The container's init on the host; AssertionError if it has no task."""
        return self.node.host_pid(self.node_pid())

    def node_pid(self) -> int:
        """The container's init as the shim knows it."""
        task = self._task()
        assert task, f"no task {self.name}"
        return int(task[1])

    def status(self) -> str:
        """RUNNING, PAUSED, STOPPED, or "" without a task."""
        task = self._task()
        return task[2] if task else ""

    def _task(self) -> list[str]:
        """Name, pid and status; empty without a task."""
        lines = (line.split() for line in self.ctr("task", "ls").stdout.splitlines()[1:])
        return next((line for line in lines if line[0] == self.name), [])

    def rootfs(self) -> Path:
        return self.node.path(
            f"/run/containerd/io.containerd.runtime.v2.task/default/{self.name}/rootfs"
        )

    def reports(self, status: str = STATUS) -> list[Report]:
        return reports(self.rootfs() / status.lstrip("/"))

    def next_report(self, status: str = STATUS) -> Report:
        """One that was begun and ended after this call."""
        before = len(self.reports(status))
        until(f"report of {self.name}", lambda: len(self.reports(status)) >= before + 2)
        last = self.reports(status)[-1]
        assert last.ok, last
        return last

    def ctr(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.node.ctr(*words, check=check, timeout=120)

    def start_checkpoint(self, images: str) -> Process:
        """`ctr task checkpoint --image-path` under way, its output in pipes."""
        words = ["ctr", "task", "checkpoint", "--image-path", images, self.name]
        return self.node.popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def checkpoint_task(
        self, images: str, *flags: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """`ctr task checkpoint --image-path`."""
        words = ["task", "checkpoint", "--image-path", images, *flags, self.name]
        return self.ctr(*words, check=check)

    def save_rootfs(self, tar: str) -> None:
        """What the container has changed in its root file system, as GRIT's agent saves it."""
        self.node.run(["sh", "-c", f"ctr snapshots diff {self.name} > {tar}"])

    def checkpoint_container(self, reference: str) -> None:
        """`ctr container checkpoint --rw --task --image`. containerd 1.7 stores the options' blob
        once and then leaves the task out of every further checkpoint, without a word, so
        checkpoints made before must be gone."""
        self.remove_checkpoints()
        self.ctr("container", "checkpoint", "--rw", "--task", "--image", self.name, reference)

    def checkpoints(self) -> list[str]:
        """The checkpoints among the node's container images."""
        return [name for name in self.ctr("images", "ls", "-q").stdout.split() if name != IMAGE]

    def remove_checkpoints(self) -> None:
        for name in self.checkpoints():
            self.ctr("images", "rm", "--sync", name)

    def restore_container(self, reference: str) -> Job:
        """`ctr container restore --live --rw` under the same name."""
        self.ctr("container", "restore", "--live", "--rw", self.name, reference)
        return self

    def end(self) -> None:
        """Kills and removes whatever there is of it. CREATED is one whose restore failed in CRIU,
        and which has no process."""
        self.ctr("task", "kill", "--signal", "SIGKILL", self.name, check=False)
        until("the task's end", lambda: self.status() in ("STOPPED", "CREATED", ""))
        if self._task():
            done = self.ctr("task", "delete", self.name, check=False)
            assert not self._task(), done.stderr
        self.ctr("container", "delete", self.name, check=False)


def honouring(node: Node) -> str:
    """The runtime name under which ctr's --image-path and --exit reach grit (facts 4.1)."""
    return GRIT if node.containerd_version >= (2, 0) else STOCK


def restored_by_annotation(start_job: Callable[..., Job], images: str, **options: Any) -> Job:
    """A new container, restored from an image directory in GRIT's layout."""
    note = f"--annotation=grit.dev/checkpoint={os.path.dirname(images)}"
    return start_job(options=[note], **options)


def go_on(before: Report, after: Report) -> None:
    """What every test of a checkpoint comes down to: the same job, further on."""
    assert after.counter > before.counter
    assert (after.device, after.cpu, after.file) == (before.device, before.cpu, before.file)
    assert after.ok
