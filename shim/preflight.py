"""What stands against a checkpoint, found out before anything is locked and before the first byte
is written: every reason at once, in one error.

Only what is certain refuses. What is not known (no NVML, say) does not, and is left to the steps
that meet it. Reads /proc and asks NVML through the helper; never asks the driver about a process.
Costs a few milliseconds, and nothing for a Pause of a container without CUDA.
"""

from __future__ import annotations

import os

from shim import devices, gpu, headroom, log, sysv
from shim.cuda import discovery
from shim.cuda.errors import LibraryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from shim.config import GritOptions
    from shim.container import Container
    from shim.cuda.discovery import Candidate
    from shim.cuda.driver import Driver
    from shim.cuda.survey import Survey

FIRST_CRIU = (4, 1, 0)

_NVML_SECONDS = 10.0

# What CRIU finds no way to dump, by what /proc/PID/fd shows of it, and what to do.
_UNDUMPABLE = (
    ("anon_inode:[io_uring]", "io_uring", "switch it off in the application (UV_USE_IO_URING=0)"),
    ("/dev/gdrdrv", "GPUDirect RDMA copies (gdrcopy)", "switch gdrcopy off in the application"),
    ("/dev/infiniband/", "InfiniBand", "close the RDMA connections (NCCL_IB_DISABLE=1)"),
)

# File systems that write less than they are given.
_COMPRESSING = ("btrfs", "zfs", "bcachefs", "f2fs", "fuse")


class Refused(Exception):
    """The checkpoint was not begun; the text gives every reason that was found."""


def before_suspend(container: Container, driver: Driver, places: Mapping[str, str]) -> None:
    """Checks a running container that is to be paused, and dumped; `places` are those of
    `Draft.takes_room_in`, none for a Pause alone. Raises Refused; CudaError if the CUDA helper does
    not start."""
    pids = container.pids()
    candidates = discovery.candidates(pids)
    problems: list[str] = []
    held = 0
    if candidates:
        problems, held = _against_suspension(container, driver, candidates, bool(places))
    if places or problems:  # most Pauses that are refused have a Checkpoint to come
        problems += _against_criu_of(container) + against_dump(pids)
    for images, remedy in places.items():
        problems += against_space(images, pids, held, remedy)
    _refuse(container, problems, "nothing was done to it, it runs on")


def before_dump(container: Container, places: Mapping[str, str]) -> None:
    """The same for a container that its client has paused, whose GPU is suspended by now. Raises
    Refused."""
    pids = container.pids()
    problems = _against_criu_of(container) + against_dump(pids)
    uncopied = 0
    suspension = container.suspension
    if suspension is not None and suspension.engine == "plugin":  # CRIU copies as it dumps
        uncopied = sum(process.held_bytes or 0 for process in suspension.processes)
        lack = headroom.lack(container, suspension.processes)
        problems += [lack] if lack else []
    for images, remedy in places.items():
        problems += against_space(images, pids, uncopied, remedy)
    _refuse(container, problems, "nothing was written")


def against_criu(config: GritOptions) -> list[str]:
    """Whether CRIU answers, and is one that this shim knows."""
    return _ask_criu(config)[0]


def _against_criu_of(container: Container) -> list[str]:
    problems, container.criu_version = _ask_criu(container.config)
    return problems


def _ask_criu(config: GritOptions) -> tuple[list[str], str]:
    """What stands against CRIU, and its version, "" if it has none to tell."""
    from shim.criu_bridge import client
    from shim.criu_bridge.errors import CriuError
    from shim.criu_bridge.transport import Service, Swrk

    criu = Service(config.criu_service) if config.criu_service else Swrk(config.criu)
    try:
        version = client.version(criu)
    except CriuError as error:
        return [f"CRIU cannot be used: {error}"], ""
    text = ".".join(map(str, version))
    problems = []
    if version < FIRST_CRIU:
        problems = [
            f"CRIU is {text}, and 4.1 or later is needed: install one, or name it as `criu`"
        ]
    return problems, text


def against_dump(pids: list[int]) -> list[str]:
    """What CRIU cannot dump in these processes, with who has it."""
    holders: dict[int, list[str]] = {}
    for pid in pids:
        kinds = _kinds_held(pid)
        for kind in kinds:
            holders.setdefault(kind, []).append(sysv.named(pid))
    return [
        f"{', '.join(who)} {'uses' if len(who) == 1 else 'use'} {_UNDUMPABLE[kind][1]} (holds "
        f"{_UNDUMPABLE[kind][0]} open), which CRIU cannot dump: {_UNDUMPABLE[kind][2]}"
        for kind, who in sorted(holders.items())
    ] + sysv.against_dump(pids)


def against_cuda(
    config: GritOptions, driver: Driver, candidates: list[Candidate]
) -> tuple[list[str], str, Survey]:
    """What stands against suspending these processes; the engine that would, "" if none can; what
    NVML says of them."""
    from shim.cuda import engine, limits
    from shim.cuda.survey import Survey

    try:
        library = driver.library()
    except LibraryError as error:
        # Images bring a libcuda of their own: without device and driver there is no CUDA.
        if any(candidate.devices for candidate in candidates):
            return [str(error)], "", Survey()
        return [], "", Survey()
    version = devices.driver_version()
    problems = []
    chosen = ""
    try:
        chosen = engine.choose(gpu.policy(config), library)
        if library.missing and not config.cuda_checkpoint:
            problems.append(
                f"{library.path} lacks {', '.join(library.missing)} (they came with r570): name "
                "NVIDIA's `cuda-checkpoint` as `cuda_checkpoint`"
            )
    except LibraryError as error:
        known = f" (NVIDIA driver {version})" if version else ""
        problems.append(f"{error}{known}")
    survey = driver.survey([one.pid for one in candidates], timeout=_NVML_SECONDS)
    for one in candidates:
        for reason in limits.reasons(one.pid, survey, limits.major(version)):
            problems.append(f"pid {one.pid} ({one.comm}) {reason}")
    return problems, chosen, survey


def against_space(
    images: str, pids: list[int], device_bytes: int, remedy: str = "name another"
) -> list[str]:
    """Whether the images certainly do not fit: the processes' own memory, and `device_bytes` yet to
    be copied into it, against what is free where they are to be written. What other files they
    take, and shared memory, is not counted. `remedy`: how to get another directory."""
    try:
        found = os.statvfs(images)
    except OSError as error:
        return [f"the image directory {images} cannot be looked at: {error.strerror}"]
    free = found.f_bfree * found.f_frsize
    resident = sum(map(_private_memory, pids))
    # The driver leaves some of what it says to be in use uncopied, see there.
    need = resident + max(device_bytes - headroom.MARGIN_BYTES, 0)
    if not found.f_blocks or free >= need or _file_system(images).startswith(_COMPRESSING):
        return []
    what = f"{headroom.size(resident)} of memory"
    if device_bytes:
        what += f" and {headroom.size(device_bytes)} of device memory"
    return [
        f"the images need at least {headroom.size(need)} ({what}), and {headroom.size(free)} are "
        f"free in {os.path.dirname(images)}: free space, or {remedy} directory"
    ]


def _against_suspension(
    container: Container, driver: Driver, candidates: list[Candidate], dump: bool
) -> tuple[list[str], int]:
    """The problems, and how much device memory is known to be in use."""
    from shim.cuda.suspension import from_candidate

    problems, engine, survey = against_cuda(container.config, driver, candidates)
    if survey.unknown:
        log.warning(
            "NVML does not say which processes use the GPU", id=container.id, reason=survey.unknown
        )
    processes = []
    for one in candidates:
        used = survey.used(one.pid)
        if used:
            process = from_candidate(one)
            process.held_bytes = used
            processes.append(process)
    if dump or engine == "driver":  # CRIU's plugin copies nothing at a Pause
        lack = headroom.lack(container, processes)
        problems += [lack] if lack else []
    return problems, sum(process.held_bytes or 0 for process in processes)


def _refuse(container: Container, problems: list[str], state: str) -> None:
    if not problems:
        return
    if len(problems) > 1:
        problems = [f"({number}) {text}" for number, text in enumerate(problems, 1)]
    raise Refused(f"container {container.id}: refused: {'; '.join(problems)}; {state}")


def _kinds_held(pid: int) -> set[int]:
    """Which of _UNDUMPABLE the process holds open."""
    directory = f"/proc/{pid}/fd"
    kinds: set[int] = set()
    try:
        names = os.listdir(directory)
    except OSError:
        return kinds
    for name in names:
        try:
            target = os.readlink(f"{directory}/{name}")
        except OSError:
            continue
        kinds.update(n for n, (mark, _, _) in enumerate(_UNDUMPABLE) if target.startswith(mark))
    return kinds


def _private_memory(pid: int) -> int:
    """Bytes of a process that CRIU writes for certain: proc_pid_status(5) RssAnon and VmSwap."""
    total = 0
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("RssAnon:", "VmSwap:")):
                    total += int(line.split()[1]) << 10
    except OSError:
        pass
    return total


def _file_system(path: str) -> str:
    """The type of the file system that a path is on, as in /proc/mounts; "" if it is not found."""
    kind, longest = "", -1
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            left, _, right = line.partition(" - ")
            point = left.split(" ")[4]
            below = point in ("/", path) or path.startswith(point + "/")
            if below and len(point) >= longest:
                kind, longest = right.split(" ", 1)[0], len(point)
    return kind
