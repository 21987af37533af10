"""What must hold on a node for a checkpoint to work: each check looks at the real thing and returns
lines of what it found. No check raises, and none changes anything.
"""

from __future__ import annotations

import glob
import itertools
import os
import socket
import struct
import subprocess
import tomllib

from shim import config, devices, gpu, headroom, inner, places, sealed, signing
from shim.criu_bridge import client, transport
from shim.criu_bridge.errors import CriuError
from shim.cuda.errors import CudaError
from shim.gritctl import messages as m
from shim.gritctl import output
from shim.gritctl.containerd import INTROSPECTION, Containerd, ContainerdError
from shim.manifest import CheckpointDirError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from shim.config import GritOptions

PASS, WARN, FAIL = "pass", "warn", "fail"

CONFIG = "/etc/containerd/config.toml"
"""containerd's, unless it was started with another."""

_SHIM = "containerd-shim-grit-v1"
_RUNTIME = "io.containerd.grit.v1"
_CHECK_SECONDS = 60.0
_TIGHT_BYTES = 1 << 30  # of disk; less is worth a word
_LEAST_BYTES = 16 << 20  # images of the smallest container

_FIRST_CRIU = (4, 1, 0)
_CRIU_OF_SOCKETS = (4, 2, 0)
_KERNEL_OF_SOCKETS = (6, 16)
_DRIVER_OF_ENGINE = 570
_DRIVER_OF_PLUGIN = 555


class Line:
    """One line of the doctor's: `status` is PASS, WARN or FAIL; `fix` says what to do."""

    __slots__ = ("check", "fix", "found", "status")

    def __init__(self, check: str, status: str, found: str, fix: str = "") -> None:
        self.check, self.status, self.found, self.fix = check, status, found, fix

    def to_dict(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in ("check", "status", "found", "fix")}


def settings(path: str | None) -> tuple[GritOptions, Line]:
    """grit.toml, and what is to be said of it; with a mistake in it, the defaults."""
    where = path or config.DEFAULT_PATH
    try:
        found = config.load(path)[1]
    except config.ConfigError as error:
        return config.GritOptions(), Line("grit.toml", FAIL, str(error), "correct that line")
    there = os.path.exists(where)
    text = f"{where}, engine {found.engine}" if there else f"no {where}: everything as by default"
    return found, Line("grit.toml", PASS, text)


def trust(options: GritOptions) -> Iterator[Line]:
    """Keys and roots, where any are configured: a restore would find out too late."""
    for setting, paths in (
        ("sign_key", [options.sign_key] if options.sign_key else []),
        ("verify_keys", options.verify_keys),
    ):
        for path in paths:
            try:
                found = signing.described(path)
                if setting == "sign_key":
                    signing.signer(path)
            except signing.SigningError as error:
                yield Line(setting, FAIL, str(error), f"put it right, or take it out of {setting}")
            else:
                yield Line(setting, PASS, found)
    try:
        keys = sealed.keys(options)
    except CheckpointDirError as error:
        yield Line("encryption", FAIL, str(error), "put it right, or take it out of grit.toml")
    else:
        if keys:
            yield Line("encryption", PASS, f"{sealed.ALGORITHM}, {', '.join(map(repr, keys))}")
    if options.scratch_dir and not os.path.isdir(options.scratch_dir):
        text = f"there is no directory {options.scratch_dir}"
        yield Line("scratch_dir", FAIL, text, "make or mount it, or take it out of grit.toml")
    for root in options.checkpoint_roots:
        if not os.path.isdir(root):
            yield Line(
                "checkpoint_roots", WARN, f"there is no directory {root}",
                "make or mount it, or take it out of checkpoint_roots",
            )  # fmt: skip


def kernel() -> Iterator[Line]:
    release = os.uname().release
    missing = [
        path
        for path in (
            "/proc/self/map_files",
            "/proc/self/ns/pid",
            f"/proc/self/task/{os.getpid()}/children",
        )
        if not os.path.exists(path)
    ]
    if missing:
        yield Line(
            "kernel", FAIL, f"Linux {release} without {', '.join(missing)}",
            "use a kernel with CONFIG_CHECKPOINT_RESTORE and CONFIG_PROC_CHILDREN",
        )  # fmt: skip
    else:
        yield Line("kernel", PASS, f"Linux {release}")
    yield Line("cgroups", PASS, _cgroups())
    yield _huge_pages()


def criu(options: GritOptions, path: str) -> Iterator[Line]:
    """`path` is containerd's PATH: the shim looks for CRIU there."""
    fix = "install CRIU 4.1 or later, or name it as `criu` in grit.toml"
    environment = {**os.environ, "PATH": path}
    try:
        version = client.version(transport.Swrk(options.criu, environment))
    except (CriuError, OSError) as error:
        yield Line("CRIU", FAIL, str(error), fix)
        return
    shown = ".".join(map(str, version))
    if version < _FIRST_CRIU:
        yield Line("CRIU", FAIL, f"{shown}: 4.1 or later is needed", fix)
    elif version < _CRIU_OF_SOCKETS and _kernel_version() >= _KERNEL_OF_SOCKETS:
        yield Line(
            "CRIU", WARN, f"{shown}: on Linux 6.16 and later it cannot dump internet sockets",
            "install CRIU 4.2 if the containers have any",
        )  # fmt: skip
    else:
        yield Line("CRIU", PASS, shown)
    yield _criu_check(options.criu, environment)
    if options.criu_service and not os.path.exists(options.criu_service):
        yield Line(
            "CRIU service", FAIL, f"{options.criu_service} does not exist",
            "start `criu service` there, or take criu_service out of grit.toml",
        )  # fmt: skip
    yield from _criu_configuration()


def plugin(options: GritOptions, engine: str) -> Line:
    """CRIU's CUDA plugin, of which only the plugin engine has need."""
    path = os.path.join(gpu.plugin_directory(options), "cuda_plugin.so")
    if os.path.exists(path):
        return Line("CRIU plugin", PASS, path)
    if "plugin" in (options.engine, engine):
        return Line(
            "CRIU plugin", FAIL, f"{path} does not exist, and the engine is plugin",
            'name its directory as `plugin_dir`, or set engine = "driver"',
        )  # fmt: skip
    return Line("CRIU plugin", PASS, "none, and the driver engine needs none")


def graphics(options: GritOptions, path: str) -> Iterator[Line]:
    """The driver, its library, the GPUs, and which engine that makes. `path` as for `criu`."""
    version = devices.driver_version()
    engine = ""
    try:
        engine = gpu.choose(options, options.engine)
        engine_line = Line("engine", PASS, f"{engine} (asked for: {options.engine})")
    except CudaError as error:
        engine_line = Line("engine", FAIL, str(error), "see the lines above and below")
    try:
        with gpu.helper(options) as driver:
            library = driver.library()
        lacks = f", without {', '.join(library.missing)}" if library.missing else ""
        cuda = f"CUDA {library.cuda_version // 1000}.{library.cuda_version % 1000 // 10}"
        library_line = Line("libcuda", PASS, f"{library.path}, {cuda}{lacks}")
    except CudaError as error:
        library_line = Line(
            "libcuda", FAIL, str(error), "install the NVIDIA driver, or name it as `libcuda`"
        )
    yield _driver(version, engine, library_line.status)
    yield _gpus()
    yield library_line
    yield engine_line
    yield plugin(options, engine)
    yield _cuda_checkpoint(options, path, engine)
    yield _toolkit()
    if options.lane_compression != "off":
        yield compression(options)


def node(directory: str) -> Iterator[Line]:
    """Memory for the copies, disk for the images."""
    available = headroom.memory_available()
    yield Line("memory", PASS, f"{output.size(available)} available")
    place = os.path.abspath(directory)
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    found = os.statvfs(place)
    free = found.f_bavail * found.f_frsize
    text = f"{output.size(free)} free in {place}"
    fix = "free space, or save to another place: --to"
    if free < _LEAST_BYTES or not found.f_favail:
        yield Line("disk", FAIL, text if found.f_favail else f"no inodes left in {place}", fix)
    elif free < _TIGHT_BYTES:
        yield Line("disk", WARN, text, fix)
    else:
        yield Line("disk", PASS, text)


def containerd(connection: Containerd) -> Iterator[Line]:
    try:
        version = connection.version().removeprefix("v")
    except ContainerdError as error:
        yield Line("containerd", FAIL, str(error), "start containerd, or name its --address")
        return
    numbers = tuple(int(word) for word in version.split("~")[0].split(".")[:2] if word.isdigit())
    if numbers and numbers < (1, 7):
        yield Line("containerd", WARN, f"{version}: checkpoints are tested from 1.7", "upgrade it")
    else:
        yield Line("containerd", PASS, version)
    snapshotters: list[str] = []
    broken: list[str] = []
    for one in connection.call(INTROSPECTION, "Plugins", m.Filters(), m.PluginList).plugins:
        if one.type == "io.containerd.snapshotter.v1":
            (broken if one.init_err else snapshotters).append(one.id)
    if snapshotters:
        yield Line("snapshotter", PASS, ", ".join(sorted(snapshotters)))
    else:
        yield Line("snapshotter", FAIL, f"none works ({', '.join(broken)})", "see containerd's log")


class Daemon:
    """The containerd behind a socket: its program, PATH and configuration, by its process."""

    def __init__(self, address: str) -> None:
        self.path = os.environ.get("PATH", os.defpath)
        self.program = "containerd"
        self.arguments: list[str] = []
        self.known = False
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.connect(address)
                pid, _, _ = struct.unpack(
                    "iii", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
                )
            with open(f"/proc/{pid}/environ", "rb") as file:
                for entry in file.read().split(b"\0"):
                    if entry.startswith(b"PATH="):
                        self.path = os.fsdecode(entry[5:])
            self.program = os.readlink(f"/proc/{pid}/exe")
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                self.arguments = [os.fsdecode(word) for word in file.read().split(b"\0")[1:]]
            self.known = True
        except OSError:
            pass  # not root, or not running: our own PATH has to do

    def find(self, program: str) -> str:
        """Where containerd finds a program: in its PATH or beside itself; "" if nowhere."""
        places_ = [*self.path.split(":"), os.path.dirname(self.program)]
        for place in filter(None, places_):
            candidate = os.path.join(place, program)
            if os.access(candidate, os.X_OK):
                return candidate
        return ""

    def configuration(self) -> tuple[dict[str, Any], str]:
        """What containerd runs with, imports and defaults included; or why that is not known."""
        file = CONFIG
        for word, following in itertools.pairwise([*self.arguments, ""]):
            if word in ("-c", "--config"):
                file = following
            elif word.startswith("--config="):
                file = word.partition("=")[2]
        command = [self.program, "--config", file, "config", "dump"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=True
            )
            found = tomllib.loads(done.stdout)
            # containerd leaves these out of its dump.
            with open(file, "rb") as own:
                found["disabled_plugins"] = tomllib.load(own).get("disabled_plugins") or []
        except FileNotFoundError:
            return {}, f"there is no {file}"
        except subprocess.CalledProcessError as error:
            return {}, (error.stderr.strip().splitlines() or ["no reason given"])[-1]
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            return {}, str(error)
        return found, ""


def runtime(daemon: Daemon) -> Iterator[Line]:
    """Whether this containerd finds grit, the stock shim and runc, and how CRI is told of grit."""
    guess = "" if daemon.known else " (by our own PATH: containerd's is only shown to root)"
    for check, program, fix in (
        ("shim", _SHIM, "make install with a PREFIX whose bin is in containerd's PATH"),
        ("stock shim", inner.NAME, "install containerd's shims beside containerd"),
        ("runc", "runc", "install runc"),
    ):
        found = daemon.find(program)
        if not found:
            yield Line(
                check, FAIL, f"{program} is not in containerd's PATH, {daemon.path}{guess}", fix
            )
        elif check == "runc":
            yield Line(check, PASS, f"{found}, {_first_line([found, '--version'])}")
        else:
            yield Line(check, PASS, found + guess)
    yield from _cri(daemon)


def config_path(daemon: Daemon) -> str | None:
    """The grit.toml that containerd's configuration names; None if it names none."""
    for table in _runtimes(daemon.configuration()[0]).values():
        options = table.get("options")
        if table.get("runtime_type") == _RUNTIME and isinstance(options, dict):
            path = options.get("ConfigPath")
            return path if isinstance(path, str) and path else None
    return None


def _cri(daemon: Daemon) -> Iterator[Line]:
    document, problem = daemon.configuration()
    label = "runtime"
    if problem:
        yield Line(label, WARN, f"containerd's configuration cannot be read: {problem}", "be root")
        return
    disabled = document.get("disabled_plugins") or []
    if {"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "cri"} & set(disabled):
        yield Line(label, PASS, "CRI is switched off, and ctr needs no entry")
        return
    tables = _runtimes(document)
    ours = {
        name: table
        for name, table in tables.items()
        if table.get("runtime_type") == _RUNTIME
        or os.path.basename(str(table.get("runtime_path") or "")) == _SHIM
    }
    entry = "take packaging/containerd/config-v*.toml into containerd's configuration, restart it"
    near = [
        n for n, t in tables.items() if "grit" in f"{n}{t.get('runtime_type')}" and n not in ours
    ]
    if near:
        wrong = tables[near[0]].get("runtime_type")
        yield Line(
            label, FAIL, f"the runtime {near[0]} has runtime_type {wrong!r}: that is not grit",
            f'set runtime_type = "{_RUNTIME}" and restart containerd',
        )  # fmt: skip
    elif not ours:
        yield Line(label, WARN, "CRI knows no runtime of grit's; ctr needs none", entry)
    for name, table in ours.items():
        yield from _entry(name, table)


def _entry(name: str, table: dict[str, Any]) -> Iterator[Line]:
    label = f"runtime {name}"
    options = table.get("options")
    path = options.get("ConfigPath") if isinstance(options, dict) else None
    binary = table.get("runtime_path")
    if binary and not os.access(binary, os.X_OK):
        yield Line(label, FAIL, f"runtime_path {binary} cannot be run", "correct it")
    elif path and not os.path.exists(path):
        yield Line(
            label, FAIL, f"ConfigPath {path} does not exist: no container starts",
            f"create {path} (it may be empty), or correct ConfigPath",
        )  # fmt: skip
    elif not any(
        str(note).startswith(("grit.dev", "*"))
        for key in ("pod_annotations", "container_annotations")
        for note in table.get(key) or []
    ):
        yield Line(
            label, WARN, "annotations grit.dev/* do not reach it: nothing is restored by them",
            'pod_annotations = ["grit.dev/*"] and container_annotations = ["grit.dev/*"]',
        )  # fmt: skip
    else:
        yield Line(label, PASS, f"{table.get('runtime_type')}" + f", {path}" * bool(path))


def _runtimes(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    plugins = document.get("plugins") or {}
    found: dict[str, dict[str, Any]] = {}
    for name in ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"):
        tables = ((plugins.get(name) or {}).get("containerd") or {}).get("runtimes") or {}
        found |= {key: table for key, table in tables.items() if isinstance(table, dict)}
    return found


def _driver(version: str | None, engine: str, library: str) -> Line:
    if version is None:
        if library == PASS:
            return Line("driver", WARN, "its version is not known: no /proc/driver/nvidia")
        return Line("driver", FAIL, "the NVIDIA driver is not loaded", "install it: r570 or later")
    head = version.partition(".")[0]
    major = int(head) if head.isdigit() else 0
    least = _DRIVER_OF_PLUGIN if engine == "plugin" else _DRIVER_OF_ENGINE
    if major < least:
        status = FAIL if major < _DRIVER_OF_PLUGIN else WARN
        return Line("driver", status, f"{version}: r{least} or later is needed", "upgrade it")
    return Line("driver", PASS, version)


def _gpus() -> Line:
    try:
        found = [gpu_["name"] for gpu_ in devices.installed().values()]
    except OSError as error:
        return Line("GPUs", WARN, f"cannot be listed: {error}")
    if not found:
        return Line("GPUs", WARN, "the driver lists none", "see `nvidia-smi` and `dmesg`")
    kinds = {name: found.count(name) for name in dict.fromkeys(found)}
    return Line("GPUs", PASS, ", ".join(f"{count} x {name}" for name, count in kinds.items()))


def _cuda_checkpoint(options: GritOptions, path: str, engine: str) -> Line:
    """The command with which CRIU's plugin asks and tells the driver; the driver engine needs none.
    NVIDIA's, by configuration or on PATH, else ours."""
    label = "cuda-checkpoint"
    named = options.cuda_checkpoint
    if named and not os.access(named, os.X_OK):
        return Line(label, FAIL, f"{named} cannot be run", "correct cuda_checkpoint in grit.toml")
    on_path = [os.path.join(place, label) for place in path.split(":") if place]
    ours = os.path.join(places.commands(), label)
    for candidate in filter(None, (named, *on_path, ours)):
        if os.access(candidate, os.X_OK):
            return Line(label, PASS, candidate + " (ours)" * (candidate == ours))
    if engine == "plugin":
        return Line(label, FAIL, "none", "make install puts ours there")
    return Line(label, PASS, "none, and the driver engine needs none")


def _toolkit() -> Line:
    where = "/etc/nvidia-container-runtime/config.toml"
    specs = [p for p in ("/etc/cdi", "/var/run/cdi") if os.path.isdir(p) and os.listdir(p)]
    cdi = f", CDI specifications in {', '.join(specs)}" if specs else ""
    try:
        with open(where, "rb") as file:
            table = tomllib.load(file).get("nvidia-container-runtime")
    except FileNotFoundError:
        return Line("toolkit", PASS, f"no {where}: containers get their devices otherwise{cdi}")
    except (OSError, ValueError) as error:
        return Line("toolkit", WARN, f"{where} cannot be read: {error}")
    mode = table.get("mode", "auto") if isinstance(table, dict) else "auto"
    if mode == "legacy":
        return Line(
            "toolkit", WARN, "mode legacy: a hook brings the devices, which grit cannot foresee "
            "at a restore", f'set mode = "cdi" in {where}',
        )  # fmt: skip
    return Line("toolkit", PASS, f"mode {mode}{cdi}")


def compression(options: GritOptions) -> Line:
    """Whether the libraries are there for what `lane_compression` asks for."""
    from shim.cuda import codec

    wanted = options.lane_compression
    names = list(codec.LIBRARIES) if wanted == "auto" else [wanted]
    missing = codec.missing(names)
    if not missing:
        return Line("compression", PASS, f"{', '.join(names)} (asked for: {wanted})")
    have = ", ".join(name for name in names if name not in missing) or "none"
    why = "; ".join(missing.values())
    return Line("compression", WARN, f"{have}: {why}", "install the library")


def _cgroups() -> str:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "v2"
    return "v1 and v2 (hybrid)" if os.path.isdir("/sys/fs/cgroup/unified") else "v1"


def _huge_pages() -> Line:
    """Under `madvise` each copy asks for them itself (`cuda/prefault.py`); without them a copy was
    measured to take 1.5 times as long."""
    where = "/sys/kernel/mm/transparent_hugepage/enabled"
    try:
        with open(where, encoding="ascii") as file:
            mode = file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return Line("huge pages", WARN, f"no {where}: GPU memory is copied more slowly")
    if mode in ("always", "madvise"):
        return Line("huge pages", PASS, mode)
    fix = f"echo madvise > {where}"
    return Line("huge pages", WARN, f"{mode}: GPU memory is copied 1.5 times slower", fix)


def _criu_check(binary: str, environment: dict[str, str]) -> Line:
    label = "CRIU's check"
    if os.geteuid():
        return Line(label, WARN, "not asked: only root can", "be root")
    try:
        done = subprocess.run(
            [binary, "check"], env=environment, capture_output=True, text=True,
            timeout=_CHECK_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return Line(label, FAIL, f"criu check: {error}")
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        return Line(
            label, FAIL, f"criu check: {lines[-1] if lines else 'failed'}", "see `criu check`"
        )
    return Line(label, PASS, "looks good")


def _criu_configuration() -> Iterator[Line]:
    """CRIU reads default.conf, runc has it read runc.conf; a container may name others."""
    found = False
    for path in sorted(glob.glob("/etc/criu/*.conf")):
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                kept = [line.split("#")[0].strip() for line in file]
        except OSError as error:
            yield Line("CRIU's settings", WARN, f"{path} cannot be read: {error.strerror}")
            continue
        lines = [line for line in kept if line]
        if lines:
            found = True
            yield Line(
                "CRIU's settings",
                WARN,
                f"{path} has: {'; '.join(lines[:6])}",
                "they hold for every dump and restore: look whether they are meant to",
            )
    if not found:
        yield Line("CRIU's settings", PASS, "nothing in /etc/criu/*.conf")


def _kernel_version() -> tuple[int, ...]:
    words = os.uname().release.split("-")[0].split(".")
    return tuple(int(word) for word in words[:2] if word.isdigit())


def _first_line(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stdout.splitlines() or [""])[0].removeprefix("runc version ")
