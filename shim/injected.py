"""What a container has that its client did not ask for: mounts and devices that a runtime hook
(NVIDIA's legacy mode) or a runtime in runc's place (nvidia-container-runtime, by CDI) put in.

`runc restore` gives none of it again: hooks run before there is a mount tree to put anything into
(runc#5296), and nvidia-container-runtime edits the configuration at `create` alone. So a checkpoint
notes it, and a restore gives it again where the new container's own configuration does not. The
note comes from storage that others may have written to: of the host's files it gets none but the
driver's.
"""

from __future__ import annotations

import os
import re
import stat

from shim import bundle, devices, log
from shim.criu_bridge import request
from shim.criu_bridge.mounts import resolve_in_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.container import Container
    from shim.devices import Gpu
    from shim.manifest import Manifest
    from shim.runcstate import RunState

    Option = tuple[str, str | None]

LARGEST_FILE = 1 << 16
"""Bytes of a mounted file that no path leads to any more and that is kept in the manifest. NVIDIA's
is /proc/driver/nvidia/params, of a kilobyte."""

# Where a driver's files are, on the host or in a driver container's root, and what they are called.
_DRIVER_PLACES = re.compile(
    r"/(usr|lib|lib64|opt|etc|run|dev|home/kubernetes/bin)/|/proc/driver/nvidia(/|$)"
)
_DRIVER_NAMES = re.compile(r"nvidia|cuda|nvcuvid|nvoptix|/dev/dri/")
_PODS = re.compile(r"/(kubelet|containerd|secrets|credentials)(/|$)")

_HOOKS_AT_RESTORE = ("prestart", "createRuntime")  # runc 1.1 to 1.5 runs no other then

_MADE_BY_CRIU = ("/dev/", "/proc/", "/sys/")  # file systems that come out of the images


class NotGiven(Exception):
    """The container to be restored cannot be given what the checkpointed one had."""


def recorded(container: Container, state: RunState) -> tuple[list[dict[str, str]], list[str]]:
    """For the manifest: the container's external mounts and its NVIDIA device files.

    A mount is {"destination", "path", "source"}: as the configuration has it, as CRIU knows it,
    and in our mount namespace; with "text" in the place of the source for a small file that no
    path leads to."""
    mounts = [
        {"destination": destination, "path": path, "source": source}
        for destination, path, source in request.bind_mounts(state)
    ]
    root = f"/proc/{state.init_process_pid}/root"
    for hooked in request.mounts_of_hooks(state):
        mount = {"destination": hooked.destination, "path": hooked.destination}
        # In the bundle: what a restore put there, see `give_again`.
        if hooked.source and not hooked.source.startswith(container.bundle + "/"):
            mount["source"] = hooked.source
        else:
            text = _small_text(root + resolve_in_root(root, hooked.destination))
            if text is None:
                log.warning(
                    "a mount of the container comes from where no path of the host leads; a "
                    "restore will have to be given it",
                    id=container.id,
                    at=hooked.destination,
                )
                continue
            mount["text"] = text
        mounts.append(mount)
    return mounts, devices.nodes(f"{root}/dev")


def give_again(
    container: Container, manifest: Manifest, spec: dict[str, Any], given: list[Gpu]
) -> list[Option]:
    """Changes the specification of a container to be restored, and returns the lines of CRIU's
    configuration, so that it has what the checkpointed one had. `given` are its own GPUs. Raises
    NotGiven."""
    if not devices.named_in(spec):
        _allow(spec, [one for one in manifest.devices if devices.number(one) is None], given)
    _drop_hooks(container, spec)
    own = {os.path.normpath(str(m.get("destination"))) for m in spec.get("mounts") or []}
    lines: list[Option] = []
    lost = []
    for number, mount in enumerate(manifest.mounts):
        if {os.path.normpath(mount["destination"]), mount["path"]} & own:
            continue  # runc tells CRIU
        source = os.path.realpath(mount.get("source", "/"))
        if "text" in mount:
            source = os.path.join(container.bundle, f"grit-mount-{number}")
            bundle.replace(source, mount["text"], mode=0o444)
        elif not _is_the_drivers(source):
            lost.append(f"{mount['destination']} (was {source} of the host, none of the driver's)")
            continue
        elif not os.path.exists(source):
            lost.append(f"{mount['destination']} (was {source}, which this node does not have)")
            continue
        lines.append(("external", f"mnt[{mount['path']}]:{source}"))
    if lost:
        raise NotGiven(
            f"the checkpointed container had mounts that this one is not given: {', '.join(lost)}. "
            "Mount them into the container, or restore it where the same driver is installed"
        )
    return lines


def make_mount_points(container: Container, manifest: Manifest) -> None:
    """In the root file system of a container to be restored, before any process runs in it: what
    `give_again` has CRIU mount needs something to be mounted on."""
    rootfs = os.path.join(container.bundle, "rootfs")
    for mount in manifest.mounts:
        path = mount["path"]
        place = rootfs + resolve_in_root(rootfs, path)
        if path.startswith(_MADE_BY_CRIU) or os.path.lexists(place):
            continue
        if os.path.isdir(mount.get("source", "")):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def make_device_files(pid: int, given: list[Gpu]) -> None:
    """In the /dev of a restored container, which came out of the images: the files of the GPUs it
    was given, which may have other numbers than those of the checkpoint."""
    root = f"/proc/{pid}/root"
    for gpu in given:
        name = f"nvidia{gpu['minor']}"
        place = root + resolve_in_root(root, f"/dev/{name}")
        if os.path.lexists(place):
            continue
        try:
            found = os.stat(f"/dev/{name}")
            os.mknod(place, stat.S_IFCHR | 0o666, found.st_rdev)
            os.chmod(place, 0o666)
        except OSError as error:
            raise NotGiven(f"/dev/{name} cannot be made in it: {error.strerror}") from error


def _drop_hooks(container: Container, spec: dict[str, Any]) -> None:
    """Takes NVIDIA's hooks out of what runc would run at the restore."""
    hooks = spec.get("hooks") or {}
    for stage in _HOOKS_AT_RESTORE:
        for hook in list(hooks.get(stage) or []):
            words = [str(hook.get("path", "")), *map(str, hook.get("args") or [])]
            if any(map(devices.is_nvidias, words)):
                hooks[stage].remove(hook)
                log.info(
                    "hook left out of the restore: what it mounts is mounted by CRIU",
                    id=container.id,
                    hook=hook.get("path"),
                )


def _is_the_drivers(source: str) -> bool:
    """Whether a path of the host, without links, is a file of the driver's."""
    named = _DRIVER_PLACES.match(source) and _DRIVER_NAMES.search(source)
    return bool(named) and not _PODS.search(source)


def _allow(spec: dict[str, Any], common: list[str], given: list[Gpu]) -> None:
    """Lets the container use the GPUs it was given and the driver's `common` device files: a hook
    would have told the device controller by itself."""
    if not given:
        return
    resources = spec.setdefault("linux", {}).setdefault("resources", {})
    rules = resources.setdefault("devices", [])
    for path in [*(f"/dev/nvidia{gpu['minor']}" for gpu in given), *common]:
        try:
            found = os.stat(path)
        except OSError:
            continue  # the driver will say what it misses
        if stat.S_ISCHR(found.st_mode):
            rule: dict[str, Any] = {"allow": True, "type": "c", "access": "rw"}
            rule |= {"major": os.major(found.st_rdev), "minor": os.minor(found.st_rdev)}
            rules.append(rule)


def _small_text(path: str) -> str | None:
    try:
        # Links were followed within the container's root, and it stands still.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            data = file.read(LARGEST_FILE + 1)
        return data.decode() if len(data) <= LARGEST_FILE else None
    except (OSError, UnicodeDecodeError):
        return None
