"""What NVIDIA's container toolkit does to a container, as programs for a node: a runtime in runc's
place that edits the configuration at `create` alone, and a hook that mounts from outside.

Legacy mode: a prestart hook binds the driver's library and the device files into the container,
covers /proc/driver/nvidia, and lets the device controller know. CDI mode: mounts, devices and
hooks are written into the configuration. In both the file `params` is covered by one of a file
system that is gone afterwards (nvidia-ctk's disable-device-node-modification does so).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.nodes.node import Node

RUNTIME = "/usr/bin/nvidia-container-runtime"
HOOK = "/usr/bin/nvidia-container-runtime-hook"
CDI_HOOK = "/usr/bin/nvidia-cdi-hook"
LIBRARY = "/usr/local/nvidia/lib64/libcuda.so.580.159.04"
LINK = "/usr/local/nvidia/lib64/libcuda.so.1"
MODE = "/etc/nvidia-container-runtime-mode"

_RUNTIME = f"""#!/usr/bin/python3
import json, os, sys

def given(spec):
    env = dict(entry.partition("=")[::2] for entry in spec["process"]["env"])
    return [word for word in env.get("NVIDIA_VISIBLE_DEVICES", "").split(",") if word.isdigit()]

def edit(spec):
    mode = open("{MODE}").read()
    hooks = spec.setdefault("hooks", {{}})
    if mode == "legacy":
        words = ["nvidia-container-runtime-hook", "prestart"]
        hooks["prestart"] = [{{"path": "{HOOK}", "args": words}}]
        return
    options = ["ro", "nosuid", "nodev", "rbind", "rprivate"]
    spec["mounts"].append(
        {{"destination": "{LIBRARY}", "source": "{LIBRARY}", "type": "bind", "options": options}})
    for number in given(spec):
        path = f"/dev/nvidia{{number}}"
        device = os.stat(path).st_rdev
        numbers = {{"type": "c", "major": os.major(device), "minor": os.minor(device)}}
        devices = spec["linux"].setdefault("devices", [])
        devices.append({{"path": path, **numbers, "fileMode": 0o666}})
        rules = spec["linux"].setdefault("resources", {{}}).setdefault("devices", [])
        rules.append({{"allow": True, "access": "rwm", **numbers}})
    hooks["createContainer"] = [{{"path": "{CDI_HOOK}", "args": ["nvidia-cdi-hook"]}}]

arguments = sys.argv[1:]
if "create" in arguments:
    config = arguments[arguments.index("--bundle") + 1] + "/config.json"
    spec = json.load(open(config))
    edit(spec)
    json.dump(spec, open(config, "w"))
os.execvp("runc", ["runc", *arguments])
"""

# Both hooks: what they mount goes below the root file system of a container that is being made.
_COMMON = """#!/usr/bin/python3
import ctypes, json, os, sys

libc = ctypes.CDLL(None, use_errno=True)
OPEN_TREE, MOVE_MOUNT, AT_FDCWD, CLONE, EMPTY_PATH = 428, 429, -100, 1, 4
BIND, REMOUNT, DETACH = 4096, 32, 2

def check(result, what):
    if result < 0:
        sys.exit(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result

def mount(source, target, kind, flags, data):
    words = [word.encode() if word else None for word in (source, target, kind)]
    check(libc.mount(*words, flags, data.encode() if data else None), f"mount on {target}")

def params(rootfs):
    scratch = rootfs + "/run/nvidia-ctk-hook"
    os.makedirs(scratch, exist_ok=True)
    mount("tmpfs", scratch, "tmpfs", 0, "mode=0700")
    with open(scratch + "/params", "w") as file:
        file.write("ModifyDeviceFiles: 0\\n")
    mount(scratch + "/params", rootfs + "/proc/driver/nvidia/params", None, BIND, None)
    check(libc.umount2(scratch.encode(), DETACH), "umount")
    os.rmdir(scratch)

def proc(rootfs):
    # The kernel driver's directory, which its simulation has no way to put into every procfs.
    mount("tmpfs", rootfs + "/proc/driver", "tmpfs", 0, "mode=0555")
    os.makedirs(rootfs + "/proc/driver/nvidia/gpus")
    for name in ("version", "params"):
        open(rootfs + "/proc/driver/nvidia/" + name, "w").write("ModifyDeviceFiles: 1\\n")

state = json.load(sys.stdin)
spec = json.load(open(state["bundle"] + "/config.json"))
rootfs = os.path.join(state["bundle"], spec["root"]["path"])
"""

_HOOK = (
    _COMMON
    + f"""
env = dict(entry.partition("=")[::2] for entry in spec["process"]["env"])
gpus = [word for word in env["NVIDIA_VISIBLE_DEVICES"].split(",") if word.isdigit()]
sources = {{"{LIBRARY}": "{LIBRARY}"}}
for number in gpus:
    sources[f"/dev/nvidia{{number}}"] = f"/dev/nvidia{{number}}"
    slot = f"/proc/driver/nvidia/gpus/0000:{{int(number):02x}}:00.0"
    sources[slot] = slot
    device = os.stat(f"/dev/nvidia{{number}}").st_rdev
    groups = [line.rstrip("\\n").split(":", 2) for line in open(f"/proc/{{state['pid']}}/cgroup")]
    path = next(path for _, names, path in groups if "devices" in names.split(","))
    with open(f"/sys/fs/cgroup/devices{{path}}/devices.allow", "w") as file:
        file.write(f"c {{os.major(device)}}:{{os.minor(device)}} rw")
trees = {{
    target: check(libc.syscall(OPEN_TREE, AT_FDCWD, source.encode(), CLONE), source)
    for target, source in sources.items()
}}
space = os.open(f"/proc/{{state['pid']}}/ns/mnt", os.O_RDONLY)
check(libc.setns(space, 0x20000), "setns")
proc(rootfs)
for target, tree in trees.items():
    place = rootfs + target
    os.makedirs(os.path.dirname(place), exist_ok=True)
    if target.startswith("/proc/"):
        os.makedirs(place)
    else:
        open(place, "w").close()
    check(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, place.encode(), EMPTY_PATH), place)
mount(None, rootfs + "{LIBRARY}", None, BIND | REMOUNT | 1 | 2 | 4, None)  # ro, nosuid, nodev
if not os.path.lexists(rootfs + "{LINK}"):
    os.symlink(os.path.basename("{LIBRARY}"), rootfs + "{LINK}")
params(rootfs)
"""
)

_CDI_HOOK = (
    _COMMON
    + f"""
if not os.path.lexists(rootfs + "{LINK}"):
    os.symlink(os.path.basename("{LIBRARY}"), rootfs + "{LINK}")
proc(rootfs)
params(rootfs)
"""
)


def install(node: Node, library: str) -> None:
    """Puts the toolkit on a node; `library` is the driver's own there."""
    for path, text in ((RUNTIME, _RUNTIME), (HOOK, _HOOK), (CDI_HOOK, _CDI_HOOK)):
        node.path(path).write_text(text)
        node.path(path).chmod(0o755)
    node.path(LIBRARY).parent.mkdir(parents=True)
    node.path(LIBRARY).write_bytes(node.path(library).read_bytes())


def set_mode(node: Node, mode: str) -> None:
    """ "legacy" or "cdi"."""
    node.path(MODE).write_text(mode)
