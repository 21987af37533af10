"""The dump request of a container, made from what runc recorded of it.

It is the request `runc checkpoint` sends (runc 1.1 container_linux.go, 1.3 and later
criu_linux.go: Checkpoint), so that the stock `runc restore` restores the images; what it does
not send (time-outs, deleted files, mounts that hooks made) is added only where it is asked for
or where CRIU could not dump at all. It reads /proc and the root file system and writes nothing
but `descriptors.json`.
"""

from __future__ import annotations

import os

from shim.criu_bridge import rpc
from shim.criu_bridge.mounts import (
    HookMount,
    cgroup_v1_mount_points,
    hook_mounts,
    resolve_in_root,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.runcstate import RunState

DESCRIPTORS = "descriptors.json"

DEFAULT_CONFIG_FILE = "/etc/criu/runc.conf"
CONFIG_ANNOTATION = "org.criu.config"

_CLONE_NEWNET = 0x40000000

_CGROUP_MODES = {
    "": rpc.CG_DEFAULT,
    "soft": rpc.CG_SOFT,
    "full": rpc.CG_FULL,
    "strict": rpc.CG_STRICT,
    "ignore": rpc.CG_IGNORE,
}

# runc makes only these two namespaces external; CRIU's name and runc's key for each.
_EXTERNAL_NAMESPACES = (("NEWNET", "net", "extRootNetNS"), ("NEWPID", "pid", "extRootPidNS"))


class RequestError(Exception):
    """The container cannot be described to CRIU; nothing was asked of CRIU."""


class DumpOptions:
    """What a caller may choose. The first seven are containerd's CheckpointOptions under
    their own names; `terminal` is CRIU's shell_job.

    `cgroups_mode`: "", "soft", "full", "strict" or "ignore". `ghost_limit`: bytes. `timeout`:
    seconds that CRIU gives itself to stop all processes and to lock their devices (None: its
    default, 10). `config_file`: CRIU's configuration file, which overrides everything else
    here (None: the one runc would name).
    """

    __slots__ = (
        "cgroups_mode",
        "config_file",
        "empty_namespaces",
        "ext_unix_sk",
        "file_locks",
        "ghost_limit",
        "leave_running",
        "link_remap",
        "tcp_close",
        "tcp_established",
        "tcp_skip_in_flight",
        "terminal",
        "timeout",
    )

    def __init__(
        self,
        *,
        leave_running: bool = False,
        tcp_established: bool = False,
        ext_unix_sk: bool = False,
        terminal: bool = False,
        file_locks: bool = False,
        empty_namespaces: tuple[str, ...] = (),
        cgroups_mode: str = "",
        link_remap: bool = False,
        ghost_limit: int | None = None,
        tcp_close: bool = False,
        tcp_skip_in_flight: bool = False,
        timeout: int | None = None,
        config_file: str | None = None,
    ) -> None:
        self.leave_running = leave_running
        self.tcp_established = tcp_established
        self.ext_unix_sk = ext_unix_sk
        self.terminal = terminal
        self.file_locks = file_locks
        self.empty_namespaces = empty_namespaces
        self.cgroups_mode = cgroups_mode
        self.link_remap = link_remap
        self.ghost_limit = ghost_limit
        self.tcp_close = tcp_close
        self.tcp_skip_in_flight = tcp_skip_in_flight
        self.timeout = timeout
        self.config_file = config_file


def dump_options(state: RunState, options: DumpOptions) -> rpc.CriuOpts:
    """The options of a DUMP request, but for the directories. Raises RequestError."""
    for name in options.empty_namespaces:
        if name != "network":
            raise RequestError(f'empty namespace {name!r}: only "network" can be left empty')
    if options.cgroups_mode not in _CGROUP_MODES:
        raise RequestError(
            f"cgroups mode {options.cgroups_mode!r}: expected soft, full, strict or ignore"
        )
    return rpc.CriuOpts(
        pid=state.init_process_pid,
        log_level=4,
        root=state.rootfs,
        notify_scripts=True,
        manage_cgroups=True,
        manage_cgroups_mode=_CGROUP_MODES[options.cgroups_mode],
        freeze_cgroup=state.freezer_path,
        shell_job=options.terminal,
        leave_running=options.leave_running,
        tcp_established=options.tcp_established,
        tcp_skip_in_flight=options.tcp_skip_in_flight,
        tcp_close=options.tcp_close or None,
        ext_unix_sk=options.ext_unix_sk,
        file_locks=options.file_locks,
        link_remap=options.link_remap,
        ghost_limit=options.ghost_limit,
        timeout=options.timeout,
        # Always, as runc: the network is set up by whoever makes the container.
        empty_ns=_CLONE_NEWNET,
        orphan_pts_master=True,
        auto_dedup=False,
        lazy_pages=False,
        config_file=options.config_file or default_config_file(state),
        external=_external_namespaces(state),
        ext_mnt=[
            rpc.ExtMountMap(key=key, val=val)
            for key, val in _configured_mounts(state)
            + [(hooked.destination, hooked.destination) for hooked in mounts_of_hooks(state)]
        ],
    )


def default_config_file(state: RunState) -> str | None:
    """The CRIU configuration file runc would name: that of the annotation, none where the
    annotation is empty, runc's own where there is no annotation. It need not exist."""
    return state.labels.get(CONFIG_ANNOTATION, DEFAULT_CONFIG_FILE) or None


def mounts_of_hooks(state: RunState) -> list[HookMount]:
    """Mounts that hooks made from outside (nvidia-container-cli does), which runc does not know
    and CRIU would stumble over. Each goes into the images under its `destination`; a restore
    needs the line `external mnt[DESTINATION]:SOURCE` in CRIU's configuration file."""
    known = {key for key, _ in _configured_mounts(state)}
    known.update(mount.destination for mount in state.mounts)
    known.update(state.mask_paths)
    return [
        hooked for hooked in hook_mounts(state.init_process_pid) if hooked.destination not in known
    ]


def bind_mounts(state: RunState) -> list[tuple[str, str, str]]:
    """The bind mounts runc made by its configuration: mount point as it stands there, as CRIU
    knows it and as the images name it, and source."""
    return [
        (mount.destination, _same(state, mount.destination)[0], mount.source)
        for mount in state.mounts
        if mount.device == "bind"
    ]


def write_descriptors(state: RunState, images_dir: str) -> None:
    """Write what `runc restore` needs to give the restored process its stdio (mode 0600)."""
    import json

    text = json.dumps(state.external_descriptors, separators=(",", ":"))
    fd = os.open(
        os.path.join(images_dir, DESCRIPTORS),
        os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC,
        0o600,
    )
    with open(fd, "w", encoding="utf-8") as file:
        file.write(text)


def _external_namespaces(state: RunState) -> list[str]:
    """A namespace the container only joined is named in the images, not dumped."""
    external = []
    for type_, name, key in _EXTERNAL_NAMESPACES:
        path = state.namespace_path(type_)
        if not path:
            continue
        try:
            inode = os.stat(path).st_ino
        except OSError as err:
            raise RequestError(
                f"container {state.id} joined the {name} namespace {path}, which cannot be "
                f"looked at: {err.strerror}"
            ) from err
        external.append(f"{name}[{inode}]:{key}")
    return external


def _configured_mounts(state: RunState) -> list[tuple[str, str]]:
    """Every configured mount whose content comes from outside the container, in runc's order:
    mount point and name in the images."""
    pairs = []
    for mount in state.mounts:
        if mount.device == "bind":
            pairs.append(_same(state, mount.destination))
        elif mount.device == "cgroup" and not (state.unified or state.has_namespace("NEWCGROUP")):
            # One bind mount per controller stands for the mount of the specification.
            pairs += [_same(state, path) for path in cgroup_v1_mount_points(mount.destination)]
    for path in state.mask_paths:
        if _is_masked_file(state.init_process_pid, path):
            pairs.append((path, "/dev/null"))
    pairs += [_same(state, path) for path in state.devices]
    return pairs


def _same(state: RunState, destination: str) -> tuple[str, str]:
    """CRIU knows a mount point by its real path within the container."""
    path = resolve_in_root(state.rootfs, destination.removeprefix(state.rootfs))
    return path, path


def _is_masked_file(pid: int, path: str) -> bool:
    """Masked directories are covered by a tmpfs, which CRIU dumps; files by /dev/null."""
    import stat

    try:
        return not stat.S_ISDIR(os.stat(f"/proc/{pid}/root{path}").st_mode)
    except FileNotFoundError:
        return False
    except OSError as err:
        raise RequestError(
            f"cannot look at the masked path {path} of pid {pid}: {err.strerror}"
        ) from err
