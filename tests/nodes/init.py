"""The two processes that hold a node: a keeper on the host and the node's process 1.

Run as a script by `Node`, which gives it a JSON order and two descriptors. It makes the
node's namespaces, mounts and cgroups, says on one descriptor when the node stands, and
takes all of it away when the other descriptor, whose far end only the test holds, is
closed: a test that is killed leaves nothing behind. It must never touch a mount of the host.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
import traceback
from typing import Any

CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    _check(libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    _check(
        libc.mount(
            source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
        ),
        f"mount {kind or 'bind'} {source} at {target}",
    )


def bind(source: str, target: str, *, read_only: bool = True) -> None:
    """Shows the host's `source` in the node; makes the file or directory it is put over."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    mount(source, target, flags=MS_BIND | MS_REC)
    if read_only:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


# --- cgroups ------------------------------------------------------------------------------


def host_hierarchies() -> dict[str, str]:
    """Every cgroup tree of the host: directory name -> mount options."""
    found = {}
    with open("/proc/self/cgroup") as lines:
        for line in lines:
            _, controllers, _ = line.rstrip("\n").split(":", 2)
            if not controllers:
                found["unified"] = ""
            elif controllers.startswith("name="):
                found[controllers.removeprefix("name=")] = f"none,{controllers}"
            else:
                found[controllers] = controllers
    return found


def hierarchies(version: str) -> dict[str, str]:
    """The cgroup trees a node of this version has, as in `host_hierarchies`.

    v2: the unified tree alone, at the root (name ""). v1: every v1 tree of the host, with
    the unified one beside them, as a hybrid host has it.
    """
    if version == "v2":
        return {"": ""}
    found = host_hierarchies()
    if set(found) <= {"unified"}:
        raise RuntimeError("this host has no cgroup v1 tree: only cgroup='v2' is possible here")
    return found


def mount_cgroups(trees: dict[str, str], where: str) -> dict[str, str]:
    """Mounts the trees below `where`; returns name -> mount point."""
    points = {}
    if "" not in trees:
        mount("tmpfs", where, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
    for name, options in trees.items():
        point = os.path.join(where, name).rstrip("/")
        os.makedirs(point, exist_ok=True)
        flags = MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("cgroup", point, "cgroup" if options else "cgroup2", flags, options)
        points[name] = point
    for alias, joint in (("cpu", "cpu,cpuacct"), ("cpuacct", "cpu,cpuacct")):
        if joint in trees:
            os.symlink(joint, os.path.join(where, alias))
    return points


def enter_cgroup(point: str, name: str) -> str:
    """Makes the cgroup `name` of one tree and moves this process into it."""
    path = os.path.join(point, name)
    os.makedirs(path, exist_ok=True)
    for setting in ("cpuset.cpus", "cpuset.mems"):  # v1: empty means that nobody may enter
        if os.path.exists(os.path.join(path, setting)):
            with open(os.path.join(point, setting)) as of_parent:
                value = of_parent.read()
            with open(os.path.join(path, setting), "w") as own:
                own.write(value)
    with open(os.path.join(path, "cgroup.procs"), "w") as procs:
        procs.write("0")
    return path


def below(path: str) -> list[str]:
    """The cgroups under `path` and itself, deepest first."""
    return [directory for directory, _, _ in os.walk(path, topdown=False)]


def thaw(path: str) -> None:
    """A process in a frozen v1 cgroup cannot even be killed."""
    for directory in below(path):
        with contextlib.suppress(OSError), open(f"{directory}/freezer.state", "r+") as state:
            state.write("THAWED")


# --- the node's file systems --------------------------------------------------------------


def make_devices(root: str) -> None:
    dev = f"{root}/dev"
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=755")
    for name, (major, minor) in {
        "null": (1, 3),
        "zero": (1, 5),
        "full": (1, 7),
        "random": (1, 8),
        "urandom": (1, 9),
        "tty": (5, 0),
        "fuse": (10, 229),
    }.items():
        os.mknod(f"{dev}/{name}", 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(f"{dev}/{name}", 0o666)
    for name, target in {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
        "ptmx": "pts/ptmx",
    }.items():
        os.symlink(target, f"{dev}/{name}")
    os.mkdir(f"{dev}/pts")
    mount("devpts", f"{dev}/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666")
    os.mkdir(f"{dev}/shm")
    mount("tmpfs", f"{dev}/shm", "tmpfs", MS_NOSUID | MS_NODEV)
    os.mkdir(f"{dev}/mqueue")
    mount("mqueue", f"{dev}/mqueue", "mqueue")


def mount_root(order: dict[str, Any], scratch: str) -> str:
    """The node's root: the cached layers below, what the node writes on top of them."""
    mount("tmpfs", scratch, "tmpfs", 0, "mode=755")
    root, upper, work = f"{scratch}/root", f"{scratch}/upper", f"{scratch}/work"
    for directory in (root, upper, work):
        os.makedirs(directory, exist_ok=True)
    layers = ":".join(order["layers"])
    mount("overlay", root, "overlay", 0, f"lowerdir={layers},upperdir={upper},workdir={work}")
    return root


def build(order: dict[str, Any], scratch: str) -> None:
    """Everything process 1 does before it says that the node stands."""
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = mount_root(order, scratch)
    mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", f"{root}/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    points = mount_cgroups(hierarchies(order["cgroup"]), f"{root}/sys/fs/cgroup")
    for point in points.values():
        # Not in the root: a v2 cgroup with processes hands no controller to its children.
        enter_cgroup(point, "init")
    make_devices(root)
    mount("tmpfs", f"{root}/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777")
    # overlayfs cannot lie on overlayfs: the snapshots get a file system of their own.
    for directory in ("/var/lib/containerd", "/var/lib/kubelet"):
        os.makedirs(root + directory, exist_ok=True)
        mount("tmpfs", root + directory, "tmpfs", 0, "mode=755")
    for target, source in order["binds"].items():
        bind(source, root + target)
    for target, source in order["shares"].items():
        bind(source, root + target, read_only=False)
    socket.sethostname(order["hostname"])
    if order["private_network"]:
        raise_loopback()
    else:
        for name in ("/etc/resolv.conf", "/etc/hosts"):
            with contextlib.suppress(OSError):
                os.unlink(root + name)
            bind(os.path.realpath(name), root + name)
    os.chdir(root)
    # The old root ends up on top of the new one and is taken off.
    _check(libc.syscall(SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount the host's root")
    os.chdir("/")


def raise_loopback() -> None:
    with socket.socket() as any_socket:
        request = struct.pack("16sH14x", b"lo", 0)
        answer = fcntl.ioctl(any_socket, SIOCGIFFLAGS, request)
        (flags,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


# --- the two processes --------------------------------------------------------------------


def process_one(order: dict[str, Any], scratch: str, ready: int) -> None:
    """The node's init: reaps whoever is left to it, until it is killed."""
    _check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL), "prctl")
    try:
        unshare(CLONE_NEWNS)
        build(order, scratch)
    except BaseException:
        os.write(ready, traceback.format_exc().encode())
        os._exit(1)
    os.write(ready, b"ready")
    os.close(ready)
    os.closerange(3, 1 << 16)
    while True:
        signal.sigwait({signal.SIGCHLD})
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def keep(order: dict[str, Any], answer: int, leash: int) -> None:
    """Makes the namespaces, starts process 1, waits for the end of the leash, cleans up."""
    unshare(CLONE_NEWNS)
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    scratch = order["scratch"]
    mount("tmpfs", scratch, "tmpfs", 0, "mode=755")
    trees = f"{scratch}/cgroup"
    os.mkdir(trees)
    # All trees of the host, also for a v2 node, which shows one of them: CRIU dumps what it finds
    # from a process's root down in each, and must not find the other nodes there.
    points = mount_cgroups(host_hierarchies(), trees)
    own = {name: enter_cgroup(point, order["id"]) for name, point in points.items()}
    cgroups = list(own.values())
    flags = CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID
    unshare(flags | (CLONE_NEWNET if order["private_network"] else 0))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    told, tell = os.pipe()
    os.mkdir(f"{scratch}/node")
    pid = os.fork()
    if pid == 0:
        process_one(order, f"{scratch}/node", tell)
    os.close(tell)
    with open(told, "rb") as pipe:
        said = pipe.read()
    for point in points.values():  # back out, or the node's cgroups could not be removed
        with open(f"{point}/cgroup.procs", "w") as procs:
            procs.write("0")
    if said != b"ready":
        os.waitpid(pid, 0)
        remove(cgroups)
        raise RuntimeError(f"the node's process 1 failed: {said.decode()}")
    hidden = [path for name, path in own.items() if order["cgroup"] == "v2" and name != "unified"]
    os.write(answer, json.dumps({"pid": pid, "hidden_cgroups": hidden}).encode())
    os.close(answer)
    select.select([leash], [], [])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        for path in cgroups:
            thaw(path)
        time.sleep(0.005)
    remove(cgroups)


def remove(cgroups: list[str]) -> None:
    """Removes the node's cgroups; a process killed just now may hold one a little longer."""
    deadline = time.monotonic() + 10
    for path in cgroups:
        while os.path.exists(path):
            try:
                for directory in below(path):
                    os.rmdir(directory)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)


def main() -> None:
    order = json.loads(sys.argv[1])
    answer, leash = int(sys.argv[2]), int(sys.argv[3])
    try:
        keep(order, answer, leash)
    except BaseException as error:
        with contextlib.suppress(OSError):  # closed already: the node stood
            os.write(answer, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        raise


if __name__ == "__main__":
    main()
