"""A running node: a Debian with its own containerd, in namespaces of its own on this host.

    with Node("13") as node:
        node.start_containerd()
        node.import_image(build_image("local/busybox", "1", {}))
        node.ctr("run", "--rm", "docker.io/local/busybox:1", "one", "/bin/echo", "hello")

The node's root is an overlay over the cached root file system; whatever is written goes to
a tmpfs and is gone with the node. It has its own process, mount, network, IPC, host name
and cgroup namespace, so several stand side by side and every path compiled into containerd
(/run/containerd) is its own. `init.py` is the part that runs inside.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from tests.nodes import cache, roots

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

SOCKET = "/run/containerd/containerd.sock"
LOG = "/var/log/containerd.log"
CgroupVersion = Literal["v1", "v2"]
CONFIG = "/etc/containerd/config.toml"
ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
# CRI is off unless a test asks for it: it needs half a second and a network plugin.
CONFIG_WITHOUT_CRI = """\
version = 2
disabled_plugins = [
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
  "io.containerd.internal.v1.opt", "io.containerd.nri.v1.nri",
]
"""
# Joins the node's cgroups, then becomes nsenter: the shell costs a millisecond, while
# Python code run between fork and exec would not be safe in a test with threads.
_ENTER = 'while [ "$1" != -- ]; do echo 0 > "$1"; shift; done; shift; exec nsenter "$@"'


class NodeError(Exception):
    """A node, or something in it, did not come up."""


@dataclass(frozen=True)
class Snapshot:
    """What a node holds at one moment; `after - before` is what was left behind."""

    processes: frozenset[str]
    mounts: frozenset[str]
    sockets: frozenset[str]
    directories: frozenset[str]
    cgroups: frozenset[str]

    def __sub__(self, before: Snapshot) -> Snapshot:
        return Snapshot(
            **{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)}
        )

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


class Process(subprocess.Popen[str]):
    """A command under way in the node. `pid` is the door's (sh, then nsenter) on the host;
    signals go to its process group, so they reach the command."""

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.killpg(self.pid, sig)


class Node:
    """One node. `name` is "12", "13" or "forky"; see `roots.RECIPES`.

    cgroup: "v2", as on today's hosts, or "v1", where this host has v1 trees.
    network: "private" has nothing but a loopback; "host" is for what must download.
    layers: directories laid over the root, the last on top (an installed shim).
    binds: destination in the node -> file or directory of the host, shown read-only.
    shares: the same, writable: storage that several nodes have in common.
    """

    def __init__(
        self,
        name: str,
        *,
        cgroup: CgroupVersion = "v2",
        network: Literal["private", "host"] = "private",
        layers: Sequence[Path] = (),
        binds: Mapping[str, Path] | None = None,
        shares: Mapping[str, Path] | None = None,
    ) -> None:
        self.name = name
        self.cgroup = cgroup
        self.network = network
        self.layers = tuple(layers)
        self.binds = dict(binds or {})
        self.shares = dict(shares or {})
        self.identity = f"grit-node-{name}-{uuid.uuid4().hex[:8]}"
        self.pid = 0
        self._hidden_cgroups: list[str] = []  # in trees of the host that the node does not show
        self._keeper: subprocess.Popen[bytes] | None = None
        self._leash = -1
        self._containerd: Process | None = None

    # --- life -----------------------------------------------------------------------------

    def __enter__(self) -> Node:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Makes the node stand: about 50 ms when its root is in the cache."""
        # Only a place to mount on: every node sees its own tmpfs there, the host sees nothing.
        scratch = cache.directory() / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        order = {
            "id": self.identity,
            "hostname": f"node-{self.name}",
            "scratch": str(scratch),
            "cgroup": self.cgroup,
            "private_network": self.network == "private",
            # overlayfs wants the topmost first
            "layers": [str(p) for p in (*reversed(self.layers), roots.root(self.name))],
            "binds": {target: str(source) for target, source in self.binds.items()},
            "shares": {target: str(source) for target, source in self.shares.items()},
        }
        read_answer, answer = os.pipe()
        leash, self._leash = os.pipe()
        script = Path(__file__).with_name("init.py")
        self._keeper = subprocess.Popen(
            [sys.executable, "-ISB", str(script), json.dumps(order), str(answer), str(leash)],
            pass_fds=(answer, leash),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(answer)
        os.close(leash)
        with open(read_answer) as pipe:
            said = json.loads(pipe.read() or "{}")
        if "pid" not in said:
            self.close()
            raise NodeError(f"node {self.name} did not stand: {said.get('error', 'no answer')}")
        self.pid = said["pid"]
        self._hidden_cgroups = [f"/proc/{self._keeper.pid}/root{d}" for d in said["hidden_cgroups"]]

    def close(self) -> None:
        """Kills all in the node; its mounts go with it. A second call does nothing."""
        if self._leash >= 0:
            os.close(self._leash)
            self._leash = -1
        if self._keeper:
            status = self._keeper.wait()
            self._keeper = None
            if status and self.pid:
                raise NodeError(f"node {self.name} was not taken down cleanly (exit {status})")
        if self._containerd:
            self._containerd.wait()
            self._containerd = None
        self.pid = 0

    # --- files and commands ---------------------------------------------------------------

    def path(self, path: str) -> Path:
        """The host's view of a file in the node. An absolute symbolic link on the way is
        followed on the host: name the target instead."""
        return Path(f"/proc/{self.pid}/root", path.lstrip("/"))

    def popen(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
        **options: Any,
    ) -> Process:
        """Starts a command in the node; `options` are those of `subprocess.Popen`. `env` is
        added to `ENVIRONMENT`: nothing of the host's environment reaches the node."""
        options.setdefault("text", True)
        return Process(
            [*self._door(cwd), *map(str, argv)],
            env={**ENVIRONMENT, **(env or {})},
            start_new_session=True,
            **options,
        )

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float | None = 60,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str = "/",
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command in the node to its end.

        Raises NodeError with the command's output if it fails and `check` is set, and
        `subprocess.TimeoutExpired` after `timeout` seconds, the command killed.
        """
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        pipe = subprocess.PIPE
        with self.popen(argv, env=env, cwd=cwd, stdin=stdin, stdout=pipe, stderr=pipe) as process:
            try:
                stdout, stderr = process.communicate(input, timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                raise subprocess.TimeoutExpired(
                    argv, timeout or 0, *process.communicate()
                ) from None
        if check and process.returncode:
            raise NodeError(
                f"in node {self.name}: {shlex.join(map(str, argv))}: "
                f"exit {process.returncode}\n{stdout}{stderr}"
            )
        return subprocess.CompletedProcess(list(argv), process.returncode, stdout, stderr)

    def _door(self, cwd: str) -> list[str]:
        if not self.pid:
            raise NodeError(f"node {self.name} is not running")
        cgroups = [str(directory / "init/cgroup.procs") for directory in self.cgroup_roots()]
        cgroups += [f"{directory}/cgroup.procs" for directory in self._hidden_cgroups]
        namespaces = ["--mount", "--uts", "--ipc", "--pid", "--cgroup"]
        if self.network == "private":
            namespaces.append("--net")
        # --wd opens a path of the host; --wdns one of the node but is too new. Python's own
        # chdir would be the host's as well, so env of the node's coreutils does it.
        chdir = [] if cwd == "/" else ["env", f"--chdir={cwd}"]
        nsenter = ["--target", str(self.pid), *namespaces, "--", *chdir]
        return ["/bin/sh", "-c", _ENTER, "node", *cgroups, "--", *nsenter]

    def cgroup_roots(self) -> list[Path]:
        """The cgroup trees of the node, as the host sees them."""
        root = self.path("/sys/fs/cgroup")
        if self.cgroup == "v2":
            return [root]
        return [entry for entry in root.iterdir() if not entry.is_symlink()]

    # --- containerd -----------------------------------------------------------------------

    def start_containerd(
        self, config: str | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        """Starts containerd and returns when it says it is ready.

        `config` is the whole config.toml; None keeps the one that lies in the node, or
        writes `CONFIG_WITHOUT_CRI`.
        """
        if config is not None or not self.path(CONFIG).exists():
            self.path(CONFIG).parent.mkdir(parents=True, exist_ok=True)
            self.path(CONFIG).write_text(config or CONFIG_WITHOUT_CRI)
        # containerd tells whoever asks in systemd's way that it serves.
        notify = "/run/containerd-ready.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, self._log() as log:
            self.path(notify).unlink(missing_ok=True)
            ready.bind(str(self.path(notify)))
            ready.settimeout(0.1)
            self._containerd = self.popen(
                ["containerd", "--config", CONFIG],
                env={"NOTIFY_SOCKET": notify, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(TimeoutError):
                    if b"READY=1" in ready.recv(4096):
                        break
                if self._containerd.poll() is not None or time.monotonic() > deadline:
                    raise NodeError(f"containerd did not start:\n{self.containerd_log()[-4000:]}")
        self.ctr("version")

    def _log(self) -> IO[bytes]:
        return open(self.path(LOG), "ab")

    def stop_containerd(self) -> None:
        """Asks containerd to end (SIGTERM) and waits until it has; containers run on."""
        self._end_containerd(signal.SIGTERM)

    def kill_containerd(self) -> None:
        """SIGKILL; containers run on."""
        self._end_containerd(signal.SIGKILL)

    def _end_containerd(self, sig: int) -> None:
        if self._containerd is None:
            raise NodeError("containerd was not started")
        # The door's process group would hold the shims too: only containerd is meant.
        for pid in self.pids("containerd"):
            self.run(["kill", f"-{int(sig)}", str(pid)])
        # nsenter stops itself when what it runs is stopped, and then waits for nothing.
        self._containerd.send_signal(signal.SIGCONT)
        self._containerd.wait(30)
        self._containerd = None

    @contextlib.contextmanager
    def hung_containerd(self) -> Iterator[None]:
        """Meanwhile containerd answers nobody (SIGSTOP)."""
        assert self._containerd
        (pid,) = self.pids("containerd")
        self.run(["kill", "-STOP", str(pid)])
        try:
            yield
        finally:
            self.run(["kill", "-CONT", str(pid)])
            self._containerd.send_signal(signal.SIGCONT)  # nsenter has stopped itself, too

    def ctr(self, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`ctr ...`; options are those of `run`."""
        return self.run(["ctr", *args], **options)

    def containerd_log(self) -> str:
        """All that containerd and the shims under it have written."""
        path = self.path(LOG)
        return path.read_text(errors="replace") if path.exists() else ""

    def run_container(
        self,
        identity: str,
        image: str,
        *command: str,
        flags: Sequence[str] = ("--detach",),
        runtime: str = "io.containerd.runc.v2",
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """`ctr run --runtime RUNTIME FLAGS IMAGE ID COMMAND`; options are those of `run`.

        ctr gives every container a CPU share, which runc cannot grant where the v2 tree has
        no cpu controller (a host that keeps it in v1): there the container gets none.
        """
        shares = [] if self._has_cpu_controller() else ["--cpu-shares", "0"]
        argv = ["run", "--runtime", runtime, *shares, *flags, image, identity, *command]
        return self.ctr(*argv, **options)

    def _has_cpu_controller(self) -> bool:
        controllers = self.path("/sys/fs/cgroup/cgroup.controllers")
        return self.cgroup == "v1" or "cpu" in controllers.read_text().split()

    def import_image(
        self, tar: Path, snapshotter: str = "overlayfs", namespace: str = "default"
    ) -> None:
        """Imports an OCI image archive of the host and unpacks it for `snapshotter`."""
        with open(tar, "rb") as archive:
            local = ["--local"] if self.containerd_version >= (2, 1) else []
            argv = ["ctr", "-n", namespace, "image", "import", *local]
            argv += ["--snapshotter", snapshotter, "-"]
            pipe = subprocess.PIPE
            process = self.popen(argv, stdin=archive, stdout=pipe, stderr=pipe)
            stdout, stderr = process.communicate(timeout=120)
        if process.returncode:
            raise NodeError(f"ctr image import {tar}: {stdout}{stderr}")

    @cached_property
    def containerd_version(self) -> tuple[int, int]:
        """(1, 7) and the like: the release line of the node's containerd, which says so itself."""
        major, minor, _ = self.run(["containerd", "--version"]).stdout.split()[2].split(".", 2)
        return int(major), int(minor)

    # --- what is in it --------------------------------------------------------------------

    def processes(self) -> dict[int, list[str]]:
        """The processes in the node but for process 1: pid in the node -> command line."""
        found = {}
        for entry in self.path("/proc").iterdir():
            if entry.name.isdigit() and entry.name != "1":
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                    found[int(entry.name)] = [word.decode(errors="replace") for word in words]
        return found

    def pids(self, command: str) -> list[int]:
        """The pids in the node of the processes whose program's file name is `command`, or that
        call themselves so, as CRIU does while it dumps ("criu: dump ...")."""
        return sorted(
            pid
            for pid, words in self.processes().items()
            if os.path.basename(words[0]) == command or words[0].startswith(f"{command}: ")
        )

    def host_pid(self, pid: int) -> int:
        """The host's number of the node's process `pid`; ProcessLookupError if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            namespace = self.path(f"/proc/{pid}/ns/pid").readlink()
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    lines = (process / "status").read_text().splitlines()
                    (numbers,) = (line.split()[1:] for line in lines if line.startswith("NSpid:"))
                    # [host, node, container, ...]; other nodes have their own namespaces
                    if numbers[1:2] == [str(pid)] and (process / "ns/pid").readlink() == namespace:
                        return int(numbers[0])
        raise ProcessLookupError(f"no process {pid} in node {self.name}")

    def leaks(self) -> Snapshot:
        """What is there now; compare two of them with `-`."""
        mounts = self.path("/proc/1/mountinfo").read_text().splitlines()
        return Snapshot(
            processes=frozenset(
                f"{pid} {shlex.join(words)}"
                for pid, words in self.processes().items()
                if os.path.basename(words[0]) != "containerd"  # it may have been started anew
            ),
            mounts=frozenset(line.split()[4] for line in mounts),
            sockets=frozenset(self._below("/run/containerd/s")),
            directories=frozenset(
                self._below("/run/containerd/io.containerd.runtime.v2.task", depth=2)
                + self._below("/run/containerd/grit", depth=1)
                + self._below("/run/containerd/runc", depth=2)
                + self._below("/run/containerd/fifo", depth=1)
                + self._below("/run/containerd/io.containerd.grpc.v1.cri", depth=2)
                + self._below("/var/lib/containerd/io.containerd.grpc.v1.cri", depth=2)
                + self._below("/run/netns", depth=1)
            ),
            # <namespace>/<container>; runc leaves the namespace's cgroup, and may
            cgroups=frozenset(
                str(directory.relative_to(self.path("/sys/fs/cgroup")))
                for root in self.cgroup_roots()
                for directory in root.glob("*/*")
                if directory.is_dir()
            ),
        )

    def _below(self, directory: str, depth: int = 1) -> list[str]:
        top = self.path(directory)
        return [str(entry.relative_to(top.parent)) for entry in top.glob("/".join("*" * depth))]
