"""What CRIU's images hold, told without CRIU: processes and their memory by kind, open files,
sockets, mounts.

Field numbers and file names are those of CRIU 4.2's images (pstree, core, mm, pagemap, files and
mountpoints; the values of `status` are in criu/include/image.h). For people to look at; a dump or
a restore must not fail for want of it. Only reads, and never the pages themselves.
"""

from __future__ import annotations

import os
import socket

from shim.criu_bridge import images
from shim.criu_bridge.images import ImageError
from shim.protowire import (
    Message,
    bool_,
    bytes_,
    enum,
    message,
    optional,
    repeated,
    string,
    uint32,
    uint64,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    Connection = tuple[str, str, int, str, int]
    """"ipv4" or "ipv6", address and port of the end in the images, address and port of its peer."""

_CORE_MAGIC = 0x55053847
_MM_MAGIC = 0x57492820
_FILES_MAGIC = 0x56303138
_MOUNTS_MAGIC = 0x55563928

_DEAD = 2  # a task that had ended and was not waited for: it has no memory
_STOPPED = 3  # by a signal
_STACK, _HEAP, _FILE_PRIVATE, _ANON_SHARED = 1 << 1, 1 << 5, 1 << 6, 1 << 8
_PARENT = 1 << 0  # of a pagemap entry: the pages lie in an earlier dump

_FILE_KINDS = {
    1: "file",
    2: "pipe",
    3: "fifo",
    4: "internet socket",
    5: "unix socket",
    6: "eventfd",
    7: "epoll",
    8: "inotify",
    9: "signalfd",
    10: "packet socket",
    11: "terminal",
    12: "fanotify",
    13: "netlink socket",
    14: "namespace",
    15: "tun",
    16: "external",
    17: "timerfd",
    18: "memfd",
    19: "bpf map",
    20: "pidfd",
}
_TCP_STATES = {1: "established", 7: "closed", 8: "close-wait", 10: "listening"}
_PROTOCOLS = {6: "tcp", 17: "udp", 136: "udplite"}


class TaskCore(Message):
    task_state: int | None = optional(uint32(1))
    comm: str | None = optional(string(6))


class Core(Message):
    tc: TaskCore | None = message(3, TaskCore)


class Vma(Message):
    start: int | None = optional(uint64(1))
    end: int | None = optional(uint64(2))
    shmid: int | None = optional(uint64(4))
    status: int | None = optional(uint32(7))


class Mm(Message):
    vmas: list[Vma] = repeated(message(14, Vma))


class RegularFile(Message):
    name: str | None = optional(string(6))


class InternetSocket(Message):
    family: int | None = optional(uint32(3))
    proto: int | None = optional(uint32(5))
    state: int | None = optional(uint32(6))
    src_port: int | None = optional(uint32(7))
    dst_port: int | None = optional(uint32(8))
    src_addr: list[int] = repeated(uint32(11))
    dst_addr: list[int] = repeated(uint32(12))


class UnixSocket(Message):
    state: int | None = optional(uint32(4))
    peer: int | None = optional(uint32(8))
    name: bytes | None = optional(bytes_(11))


class OpenFile(Message):
    type: int | None = optional(enum(1))
    id: int | None = optional(uint32(2))
    reg: RegularFile | None = message(3, RegularFile)
    isk: InternetSocket | None = message(4, InternetSocket)
    usk: UnixSocket | None = message(16, UnixSocket)


class MountPoint(Message):
    """`source` is what was mounted, by the kernel's word; of a bind it says little."""

    mnt_id: int | None = optional(uint32(2))
    mountpoint: str | None = optional(string(7))
    source: str | None = optional(string(8))
    ext_mount: bool | None = optional(bool_(13))
    fsname: str | None = optional(string(14))
    ext_key: str | None = optional(string(18))


class Task:
    """A process. `memory` is the bytes of it in the images, by kind: heap, stack, anonymous, file
    (private and changed), device; `pages_id` numbers the file they lie in, None without any."""

    __slots__ = ("comm", "dead", "memory", "pages_id", "pid", "ppid", "threads")

    def __init__(self, pid: int, ppid: int, comm: str, threads: int, dead: bool) -> None:
        self.pid, self.ppid, self.comm, self.threads, self.dead = pid, ppid, comm, threads, dead
        self.memory: dict[str, int] = {}
        self.pages_id: int | None = None


class Contents:
    """All of it. `shared` is the bytes of memory shared between processes, `files` the open files
    as (kind, what it is), `mounts` as (mount point, file system, key if it comes from outside)."""

    __slots__ = ("files", "mounts", "page_files", "plugins", "shared", "tasks")

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.shared = 0
        self.files: list[tuple[str, str]] = []
        self.mounts: list[tuple[str, str, str]] = []
        self.plugins: list[str] | None = None
        self.page_files: dict[str, int] = {}
        """Of each page file the bytes that the page maps say it has."""

    def memory(self) -> dict[str, int]:
        """Bytes in the images by kind, all processes together; kinds without any left out."""
        total: dict[str, int] = {}
        for task in self.tasks:
            for kind, size in task.memory.items():
                total[kind] = total.get(kind, 0) + size
        if self.shared:
            total["shared"] = self.shared
        return total


def read(directory: str, regions: dict[int, list[tuple[int, int]]] | None = None) -> Contents:
    """The contents of an image directory. `regions` are the places, by pid as the container sees
    it, in which device memory lies. Raises ImageError naming the image that is missing or broken.
    """
    found = Contents()
    found.plugins = images.plugins(directory)
    for process in images.processes(directory):
        pid = process.pid or 0
        head = _head(directory, pid)
        dead = head.task_state == _DEAD
        task = Task(pid, process.ppid or 0, head.comm or "", len(process.threads), dead)
        found.tasks.append(task)
        if not dead:
            _read_memory(directory, task, (regions or {}).get(pid, []), found)
    for name in sorted(os.listdir(directory)):
        if name.startswith("pagemap-shmem-"):
            pages_id, entries = _pagemap(directory, name)
            size = sum(count for _, count in entries)
            found.shared += size
            _count_pages(found, pages_id, size)
        elif name.startswith("mountpoints-"):
            for mount in images.read(directory, name, MountPoint, _MOUNTS_MAGIC):
                key = mount.ext_key or (mount.mountpoint if mount.ext_mount else "") or ""
                kind = mount.fsname or mount.source or ""
                found.mounts.append((mount.mountpoint or "", kind, key))
    found.mounts.sort()
    if os.path.exists(os.path.join(directory, "files.img")):
        entries_ = images.read(directory, "files.img", OpenFile, _FILES_MAGIC)
        found.files = sorted(_described(entry) for entry in entries_)
    return found


def was_stopped(directory: str, pid: int) -> bool:
    """Whether a process had been stopped by a signal. Raises ImageError."""
    return _head(directory, pid).task_state == _STOPPED


def loopback_connections(directory: str) -> set[Connection]:
    """The TCP connections in an image directory that go through a loopback; a listening socket is
    none. Raises ImageError."""
    found: set[Connection] = set()
    if not os.path.exists(os.path.join(directory, "files.img")):
        return found
    for entry in images.read(directory, "files.img", OpenFile, _FILES_MAGIC):
        one = entry.isk
        if one is None or one.proto != socket.IPPROTO_TCP or not one.dst_port:
            continue
        family = one.family or 0
        address, peer = _address(family, one.src_addr), _address(family, one.dst_addr)
        if peer.startswith("127.") or peer == "[::1]":
            kind = "ipv6" if family == socket.AF_INET6 else "ipv4"
            ends = address.strip("[]"), one.src_port or 0, peer.strip("[]"), one.dst_port
            found.add((kind, *ends))
    return found


def _head(directory: str, pid: int) -> TaskCore:
    core = images.read(directory, f"core-{pid}.img", Core, _CORE_MAGIC)
    if not core or core[0].tc is None:
        raise ImageError(f"{directory}/core-{pid}.img: it describes no process")
    return core[0].tc


def _read_memory(
    directory: str, task: Task, regions: list[tuple[int, int]], found: Contents
) -> None:
    (mm, *_) = images.read(directory, f"mm-{task.pid}.img", Mm, _MM_MAGIC) or [Mm()]
    task.pages_id, entries = _pagemap(directory, f"pagemap-{task.pid}.img")
    areas = sorted((vma.start or 0, vma.end or 0, _kind(vma.status or 0)) for vma in mm.vmas)
    position = 0
    for start, size in entries:
        end = start + size
        while position < len(areas) and areas[position][1] <= start:
            position += 1
        at = position
        while at < len(areas) and areas[at][0] < end:
            low, high, kind = areas[at]
            low, high = max(low, start), min(high, end)
            device = sum(max(0, min(high, b) - max(low, a)) for a, b in regions)
            for name, part in (("device", device), (kind, high - low - device)):
                if part:
                    task.memory[name] = task.memory.get(name, 0) + part
            at += 1
    _count_pages(found, task.pages_id, sum(size for _, size in entries))


def _kind(status: int) -> str:
    if status & _STACK:
        return "stack"
    if status & _HEAP:
        return "heap"
    if status & _FILE_PRIVATE:
        return "file"
    return "shared" if status & _ANON_SHARED else "anonymous"


def _pagemap(directory: str, name: str) -> tuple[int, list[tuple[int, int]]]:
    """The number of the page file, and (address, bytes) of what lies in it."""
    records = images.read_records(directory, name, images.PAGEMAP_MAGIC)
    if not records:
        raise ImageError(f"{directory}/{name}: it names no page file")
    head = images.decode(images.PagemapHead, records[0])
    entries = []
    for record in records[1:]:
        entry = images.decode(images.PagemapEntry, record)
        if entry.in_parent or (entry.flags or 0) & _PARENT:
            continue
        entries.append((entry.vaddr or 0, entry.size()))
    return head.pages_id or 0, entries


def _count_pages(found: Contents, pages_id: int, size: int) -> None:
    name = f"pages-{pages_id}.img"
    found.page_files[name] = found.page_files.get(name, 0) + size


def _described(entry: OpenFile) -> tuple[str, str]:
    kind = _FILE_KINDS.get(entry.type or 0, f"type {entry.type}")
    if entry.reg:
        return kind, entry.reg.name or ""
    if entry.isk:
        return kind, _connection(entry.isk)
    if entry.usk:
        name = (entry.usk.name or b"").rstrip(b"\0").replace(b"\0", b"@").decode(errors="replace")
        listening = " listening" if entry.usk.state == 10 else ""
        return kind, (name or "(no name)") + listening
    return kind, ""


def _connection(one: InternetSocket) -> str:
    protocol = _PROTOCOLS.get(one.proto or 0, f"protocol {one.proto}")
    text = f"{protocol} {_address(one.family or 0, one.src_addr)}:{one.src_port or 0}"
    state = _TCP_STATES.get(one.state or 0, f"state {one.state}") if one.proto == 6 else ""
    if one.dst_port:
        text += f" -> {_address(one.family or 0, one.dst_addr)}:{one.dst_port}"
    return f"{text} {state}".rstrip()


def _address(family: int, words: Iterable[int]) -> str:
    raw = b"".join(word.to_bytes(4, "little") for word in words)
    try:
        text = socket.inet_ntop(family, raw)
    except (OSError, ValueError):
        return "?"
    return f"[{text}]" if ":" in text else text
