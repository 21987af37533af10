"""Whether a container's device memory fits on the host, asked before the first byte is copied, and
again before a restore puts the copy into a new container's memory.

The copy lies in memory of the container's own processes, so it is charged to the container's
control group and to all above it. Where it does not fit the kernel kills the workload; so the
checkpoint is refused, or, if the node's settings say so, the container's own limit raised until
its GPU is given back. The groups above (the pod's) share their memory with other containers: they
and the node's are never raised.
"""

from __future__ import annotations

from shim import log, memcg

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.container import Container, Restore
    from shim.cuda.suspension import Process

MARGIN_BYTES = 64 << 20
"""For each process, beside the figure of NVML and its page tables. Measured (H200, r580, 0.5 to
17.7 GB): the region is 10 MB larger than the figure, of which 75 MB are never touched."""

_PAGE_TABLES = 512  # bytes mapped for each byte of page tables, which are charged as well
_PAGE = 4096
_SETTLE_SECONDS = 2.0
_MEMINFO = "/proc/meminfo"


class NoRoom(Exception):
    """The copy would not fit; nothing was copied. The text says where and what to do."""


def lack(container: Container, processes: list[Process]) -> str:
    """Why a copy of these processes' device memory does not fit on the host, "" if it fits or can
    be made to. Changes nothing; a process whose device memory is not known counts as nothing."""
    need = _need(processes)
    if not need:
        return ""
    what = f"the device memory of {', '.join(map(str, processes))} needs {size(need)} on the host"
    available = memory_available()
    if available < need:
        return (
            f"{what}, and the node has {size(available)} available (MemAvailable). Free memory "
            "on the node, or move the container's neighbours away"
        )
    short = [limit for limit in _limits(container) if limit.free < need]
    above = [limit for limit in short if limit.group != container.memory_group()]
    if above:
        return (
            f"{what}; {_room(above[0])}, a control group above the container's that is not ours "
            "to raise. Raise the limit of the pod or slice"
        )
    if short and container.config.memory == "refuse":
        return f'{what}; {_room(short[0])}. Raise the limit, or set memory = "raise" under [grit]'
    return ""


def make_room(container: Container, processes: list[Process]) -> None:
    """Checks that these locked processes' device memory fits on the host, or makes it fit.

    A process whose device memory is not known counts as nothing, which is logged. Raises NoRoom,
    or OSError if the limit cannot be raised; `put_back` is to follow then as after a Resume."""
    for process in processes:
        if process.held_bytes is None:
            log.warning(
                "device memory of a process is not known and was not held against the limits",
                id=container.id,
                pid=process.pid,
                reason=process.note,
            )
    why = lack(container, processes)
    if why:
        raise NoRoom(f"container {container.id}: {why}")
    need = _need(processes)
    limits = _limits(container)
    if any(limit.free < need for limit in limits):
        own = container.memory_group()
        # All of them: v1 takes no memory limit above the one of memory and swap together.
        for limit in reversed([limit for limit in limits if limit.group == own]):
            _raise(container, limit, need)


def make_room_for_restore(container: Container, found: Restore, spec: dict[str, Any]) -> None:
    """The same before a container is created whose images hold device memory: it comes back in
    memory of the container, and only then goes to the GPU. Changes the limit in `spec`, for
    `restored` to put back. Raises NoRoom where the images' memory cannot fit.

    The groups above are not looked at: they are not there yet."""
    pages = found.memory_bytes
    what = f"container {container.id}: {found.images} holds {size(pages)} of memory"
    available = memory_available()
    if available < pages:
        raise NoRoom(f"{what}, and the node has {size(available)} available (MemAvailable)")
    memory = ((spec.get("linux") or {}).get("resources") or {}).get("memory") or {}
    limit = memory.get("limit") or 0
    need = sum(copy_bytes(max(p.device_bytes, p.held_bytes or 0)) for p in found.processes)
    if container.config.memory == "refuse":
        if 0 < limit < pages:
            raise NoRoom(
                f"{what}, device memory included, and its memory limit is {size(limit)}. Raise "
                'the limit, or set memory = "raise" under [grit].'
            )
        return
    for name in ("limit", "swap"):  # swap: of both together
        before = memory.get(name) or 0
        if before > 0:
            memory[name] = before + need
            found.raised_limits[before + need] = before
    if found.raised_limits:
        log.info("memory limit raised for the restore", id=container.id, was=limit, by=need)


def restored(container: Container, found: Restore) -> None:
    """Puts the limits back that `make_room_for_restore` raised; to be called when the GPU has its
    memory again. Never raises an error."""
    if not found.raised_limits:
        return
    group = container.memory_group()
    for limit in reversed(memcg.limits(group)):
        if limit.group == group and limit.value in found.raised_limits:
            before = found.raised_limits[limit.value]
            container.raised_limits[limit.file] = before, limit.value
    put_back(container)


def put_back(container: Container) -> None:
    """Sets the limits that `make_room` raised to what they were. Never raises an error: the
    container runs, and must not fail over this. What is in use above the old limit stays allowed,
    loudly, until the next Resume tries again."""
    for file, (before, raised) in reversed(list(container.raised_limits.items())):
        try:
            if memcg.value(file) != raised:
                log.info("a raised memory limit was set by somebody else", id=container.id, at=file)
            elif memcg.lower(file, before, _SETTLE_SECONDS):
                log.info("memory limit put back", id=container.id, at=file, bytes=before)
            else:
                log.error(
                    "a raised memory limit could not be put back: more is in use",
                    id=container.id,
                    at=file,
                    now=raised,
                    was=before,
                    remedy=f"echo {before} > {file}",
                )
                continue
        except FileNotFoundError:
            pass  # the container is gone, its limits with it
        except OSError as error:
            log.error(
                "a raised memory limit could not be put back",
                id=container.id,
                at=file,
                now=raised,
                was=before,
                error=error,
                remedy=f"echo {before} > {file}",
            )
            continue
        del container.raised_limits[file]


def _need(processes: list[Process]) -> int:
    return sum(copy_bytes(p.held_bytes) for p in processes if p.held_bytes is not None)


def _limits(container: Container) -> list[memcg.Limit]:
    own = container.memory_group()
    return memcg.limits(own) if own else []


def copy_bytes(held: int) -> int:
    """What the host needs for a process that holds so many bytes of device memory."""
    need = held + held // _PAGE_TABLES + MARGIN_BYTES
    return -(-need // _PAGE) * _PAGE  # the kernel keeps limits in whole pages


def _raise(container: Container, limit: memcg.Limit, need: int) -> None:
    """By all of `need`, not by what is missing: the workload's processor threads run on during
    the copy and keep the room they had."""
    raised = limit.value + need
    memcg.set_limit(limit.file, raised)
    before, _ = container.raised_limits.get(limit.file, (limit.value, 0))
    container.raised_limits[limit.file] = before, raised
    log.info("memory limit raised", id=container.id, at=limit.file, was=limit.value, bytes=raised)


def memory_available() -> int:
    """proc_meminfo(5) MemAvailable, in bytes."""
    with open(_MEMINFO, encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    raise NoRoom(f"{_MEMINFO} has no MemAvailable")


def _room(limit: memcg.Limit) -> str:
    return f"{limit.file} is {size(limit.value)}, of which {size(limit.free)} are free"


def size(bytes_: int) -> str:
    """12345678 -> "11.8 MiB"."""
    return f"{bytes_ / (1 << 20):.1f} MiB"
