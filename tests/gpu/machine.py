"""A machine with a real GPU as a node: a kit unpacked beside the system, a private containerd,
this tree's shim. Speaks the words of `tests.nodes.node.Node` that `job` uses, on the machine
itself. Whatever it changes lies under HOME, STATE and the directories that grit itself uses.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ARCHIVE = REPOSITORY / ".gpu/kit.tar.xz"
HOME = Path("/opt/grit-gpu")
KIT = HOME / "kit"
ENVIRONMENT = HOME / "env"
STATE = Path("/run/grit-gpu")
SOCKET = STATE / "containerd.sock"
IMAGE = "docker.io/local/busybox:1"
CONFIG = HOME / "grit.toml"
COMMAND = ENVIRONMENT / "libexec/cuda-checkpoint"
"""Ours: asks the driver about a process, unless that stands still."""

PAUSE = "docker.io/local/pause:1"
"""What the sandboxes of pods run; only the tests with pods bring it."""

_DEVICES = (*(f"nvidia{n}" for n in range(8)), "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
_CONTAINERD = """\
version = 3
root = "{home}/root"
state = "{state}/state"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{socket}"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.grit]
runtime_type = "io.containerd.grit.v1"
pod_annotations = ["grit.dev/*"]
container_annotations = ["grit.dev/*"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.grit.options]
TypeUrl = "containerd.runc.v1.Options"
ConfigPath = "{grit}"
"""
_CRIU = """\
#!/bin/sh
export LD_LIBRARY_PATH={release}/lib
exec {release}/bin/criu "$@"
"""


class Machine:
    """One containerd with grit under it; `use_criu` says with which CRIU. Its configuration, data
    and log are in `home`."""

    def __init__(self, home: Path = HOME) -> None:
        self._containerd: subprocess.Popen[str] | None = None
        self.home = home
        self.release = KIT

    def __enter__(self) -> Machine:
        prepare()
        self.use_criu("4.2")
        self._start_containerd()
        return self

    def __exit__(self, *error: object) -> None:
        if self._containerd:
            self._containerd.terminate()
            self._containerd.wait()
            self._pid_file.unlink(missing_ok=True)

    def use_criu(self, version: str) -> None:
        """ "4.1" or "4.2": takes effect with the next dump or restore."""
        self.release = KIT / f"criu-{version}"
        criu = HOME / "bin/criu"
        criu.parent.mkdir(exist_ok=True)
        criu.write_text(_CRIU.format(release=self.release))
        criu.chmod(0o755)

    def configure(self, **settings: Any) -> None:
        """Writes grit.toml, with `settings` under [grit]. CRIU's CUDA plugin is named in any
        case, so that the plugin engine can be asked for."""
        settings = {"plugin_dir": str(self.release / "plugin"), **settings}
        lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
        CONFIG.write_text("[grit]\n" + "".join(lines))

    @property
    def environment(self) -> dict[str, str]:
        path = [str(HOME / "bin"), str(KIT / "bin"), os.environ["PATH"]]
        libraries = [str(KIT / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
        return {
            **os.environ,
            "PATH": ":".join(path),
            "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        }

    @property
    def command(self) -> str:
        return str(COMMAND)

    def path(self, path: str) -> Path:
        return Path(path)

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(argv, env=self.environment, text=True, **options)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        timeout: float = 120,
        input: str | None = None,
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            list(map(str, argv)),
            check=False,
            input=input,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.environment,
        )
        if check and done.returncode:
            raise AssertionError(f"{argv}: exit {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def ctr(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(self.ctr_words(*words), **options)

    def ctr_words(self, *words: str) -> list[str]:
        return ["ctr", "--address", str(SOCKET), *words]

    def import_image(self, tar: Path, namespace: str) -> None:
        self.ctr("-n", namespace, "images", "import", str(tar))

    def cgroup_roots(self) -> list[Path]:
        return [Path("/sys/fs/cgroup")]

    def job_flags(self) -> list[str]:
        """`ctr run` options that give a container this machine's programs, Python, GPU and driver
        files: what a runtime hook or CDI would do, with bind mounts."""
        mounts = [(path, path) for path in shared_trees()]
        mounts += [(f"/usr/{path}", f"/{path}") for path in ("lib", "lib64")]
        flags = [f"--runtime-config-path={CONFIG}", "--net-host"]
        flags += [f"--mount=type=bind,src={s},dst={d},options=bind:ro" for s, d in mounts]
        flags += [f"--device={path}" for path in gpu_devices()]
        return flags + [f"--env={name}={value}" for name, value in job_environment().items()]

    def log(self) -> str:
        """What containerd and the shims under it have written."""
        return (self.home / "containerd.log").read_text(errors="replace")

    @property
    def _pid_file(self) -> Path:
        return self.home / "containerd.pid"

    def _end_earlier(self) -> None:
        """Ends the containerd of a run that was cut short: it holds its database's lock."""
        try:
            pid = int(self._pid_file.read_text())
            if Path(f"/proc/{pid}/comm").read_text().strip() == "containerd":
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass

    def _start_containerd(self) -> None:
        self.path(str(STATE)).mkdir(exist_ok=True)
        self._end_earlier()
        config = self.home / "config.toml"
        config.write_text(
            _CONTAINERD.format(home=self.home, state=STATE, socket=SOCKET, pause=PAUSE, grit=CONFIG)
        )
        with open(self.home / "containerd.log", "ab") as log:
            self._containerd = self.popen(
                ["containerd", "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._pid_file.write_text(str(self._containerd.pid))
        deadline = time.monotonic() + 20
        while self.ctr("version", check=False).returncode:
            if self._containerd.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"containerd did not start:\n{self.log()[-4000:]}")
            time.sleep(0.05)
        for name in self.ctr("containers", "ls", "-q").stdout.split():  # of a run that was cut
            self.ctr("task", "delete", "--force", name, check=False)
            self.ctr("containers", "delete", name, check=False)
        if IMAGE not in self.ctr("images", "ls", "-q").stdout:
            self.ctr("images", "import", str(KIT / "busybox.tar"))


def shared_trees() -> list[str]:
    """/usr, /opt, /etc, wherever Python is, and what is mounted below them, each to be bound by
    itself: CRIU takes every mount of a container for a mount of its configuration."""
    trees = ["/usr", "/opt", "/etc"]
    for prefix in (sys.prefix, sys.base_prefix):
        if not prefix.startswith(tuple(f"{tree}/" for tree in trees)) and prefix not in trees:
            trees.append(prefix)
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        mounts = [line.split()[4] for line in file]
    below = [m for m in mounts if m.startswith(("/usr/", "/opt/")) and str(HOME) not in m]
    return [tree for tree in trees if os.path.isdir(tree)] + sorted(set(below))


def gpu_devices() -> list[str]:
    return [f"/dev/{name}" for name in _DEVICES if os.path.exists(f"/dev/{name}")]


def job_environment() -> dict[str, str]:
    """By which a job finds this machine's Python and libraries."""
    found = {"PATH": os.environ["PATH"], "HOME": "/tmp"}
    if "LD_LIBRARY_PATH" in os.environ:
        found["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return found


def prepare() -> None:
    """The kit and this tree's shim, where they are not there yet."""
    if not (ENVIRONMENT / ".ready").exists():
        _install()
    _refresh()


def _install() -> None:
    """The kit, and an environment for the shim, as `make install` lays them out."""
    shutil.rmtree(HOME, ignore_errors=True)
    HOME.mkdir(parents=True, exist_ok=True)
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(KIT, filter="tar")
    python = os.path.realpath(sys._base_executable)  # type: ignore[attr-defined]
    subprocess.run([python, "-m", "venv", "--without-pip", str(ENVIRONMENT)], check=True)
    wheels = map(str, sorted((KIT / "wheels").iterdir()))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(_packages()), *wheels], check=True)
    (ENVIRONMENT / "libexec").mkdir()
    (ENVIRONMENT / ".ready").touch()


def _refresh() -> None:
    """This tree's shim, on a machine that has the kit already."""
    packages = _packages()
    shutil.rmtree(packages / "shim", ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "shim", packages / "shim", ignore=ignore)
    sys.path.insert(0, str(REPOSITORY / "packaging"))
    import install  # type: ignore[import-not-found]

    shim = KIT / "bin/containerd-shim-grit-v1"
    install.write_launcher(shim, "shim.cli", packages)
    install.write_launcher(COMMAND, "shim.cuda.command", packages)


def _packages() -> Path:
    (packages,) = ENVIRONMENT.glob("lib/python3*/site-packages")
    return packages
