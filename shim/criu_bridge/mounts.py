"""Mounts as CRIU sees them: real mount points inside a root file system, and which mounts of a
running container come from outside it.

Reads only /proc and the root file system; mounts nothing.
"""

from __future__ import annotations

import os

# Linux follows at most as many links in one path.
_MAX_LINKS = 40


class HookMount:
    """A bind mount in a container that comes from outside it: `destination` is its mount point
    in the container, `source` the path of the same file in our mount namespace (None where no
    mount of ours shows it)."""

    __slots__ = ("destination", "source")

    def __init__(self, destination: str, source: str | None) -> None:
        self.destination = destination
        self.source = source


def resolve_in_root(root: str, path: str) -> str:
    """`path` with its symbolic links resolved as if `root` were "/" (what does not exist is
    taken as it stands). The result begins with "/" and is relative to `root`."""
    todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
    done: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            if done:
                done.pop()
            continue
        try:
            target = os.readlink("/".join([root, *done, part]))
        except OSError:
            done.append(part)
            continue
        links += 1
        if links > _MAX_LINKS:
            return path
        if target.startswith("/"):
            done = []
        todo += [part for part in reversed(target.split("/")) if part not in ("", ".")]
    return "/" + "/".join(done)


def cgroup_v1_mount_points(destination: str, proc: str = "/proc") -> list[str]:
    """Where runc puts the controllers of a cgroup v1 node in a container without a cgroup
    namespace: one bind mount per hierarchy under `destination`, named as on the host (runc
    1.1 rootfs_linux.go: getCgroupMounts)."""
    with open(f"{proc}/self/cgroup", encoding="utf-8") as file:
        wanted = {name for line in file for name in line.split(":")[1].split(",")}
    points = []
    for mount in _mountinfo(f"{proc}/self/mountinfo"):
        if mount.type != "cgroup":
            continue
        found = wanted.intersection(mount.super_options)
        if found:
            # Of several mounts of a hierarchy the first counts.
            wanted -= found
            points.append(f"{destination}/{os.path.basename(mount.point)}")
    return points


def hook_mounts(pid: int, proc: str = "/proc") -> list[HookMount]:
    """Bind mounts in the mount namespace of `pid` whose source no other mount there shows.

    CRIU can make a bind mount again only from a file system that is mounted whole in the same
    namespace, or from the root file system; any other must be declared external (criu/mount.c:
    validate_mounts). Mounts of the container's configuration are among them: the caller knows
    those.
    """
    mounts = _mountinfo(f"{proc}/{pid}/mountinfo")
    roots = [mount for mount in mounts if mount.point == "/"]
    whole = {mount.device for mount in mounts if mount.root == "/"}
    ours = _mountinfo(f"{proc}/self/mountinfo")
    return [
        HookMount(mount.point, _path_of(mount, ours))
        for mount in mounts
        if mount.point != "/"
        and mount.device not in whole
        and not any(mount.device == root.device and _below(mount.root, root.root) for root in roots)
    ]


def _path_of(mount: _MountInfo, ours: list[_MountInfo]) -> str | None:
    """Where the root of a mount of another namespace lies in ours."""
    for mine in ours:
        if mine.device == mount.device and _below(mount.root, mine.root):
            rest = mount.root if mine.root == "/" else mount.root[len(mine.root) :]
            return (mine.point.rstrip("/") + rest) or "/"
    return None


class _MountInfo:
    """One line of /proc/PID/mountinfo (proc(5)), as far as it is used."""

    __slots__ = ("device", "point", "root", "super_options", "type")

    def __init__(self, line: str) -> None:
        fields = line.split(" ")
        # Optional fields end at "-"; the three behind it are type, source, super options.
        end = fields.index("-", 6)
        self.device = fields[2]
        self.root = _unescape(fields[3])
        self.point = _unescape(fields[4])
        self.type = fields[end + 1]
        self.super_options = fields[end + 3].split(",")


def _mountinfo(path: str) -> list[_MountInfo]:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        return [_MountInfo(line.rstrip("\n")) for line in file]


def _unescape(text: str) -> str:
    """mountinfo writes space, tab, newline and backslash as three octal digits."""
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)


def _below(path: str, directory: str) -> bool:
    return directory in ("/", path) or path.startswith(directory + "/")
