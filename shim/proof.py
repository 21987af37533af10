"""That a dump holds the device memory it should, shown by its images before it is published.

It happened to others that 4 GB were written, with success, where 28 GB should have been: CRIU and
its CUDA plugin take many a trouble for "no CUDA here". So nobody's word counts here but that of
the images themselves: which pages of the memory that appeared in the process are in which file.
Reads /proc and the images; runs while the processes stand still, and so must be quick.
"""

from __future__ import annotations

from shim.criu_bridge import images
from shim.cuda import discovery, states
from shim.headroom import MARGIN_BYTES, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.cuda.suspension import Process

    Ranges = list[tuple[int, int]]


class NotInImages(Exception):
    """The dump lacks a process's device memory and must not be published."""


def memory_of(processes: list[Process]) -> dict[int, Ranges]:
    """The processes' private memory before CRIU's plugin copies: what appears later is the copy."""
    return {process.pid: discovery.anonymous_memory(process.pid) for process in processes}


def require(processes: list[Process], directory: str, before: dict[int, Ranges]) -> None:
    """Notes in each process which file of the images in `directory` holds how much of its device
    memory. `before` is `memory_of` for those that CRIU's plugin copied, empty for those that were
    copied before. Raises NotInImages with all whose memory is not there."""
    lost = []
    for process in processes:
        if process.before == states.CHECKPOINTED:  # by somebody else, before we looked
            process.note = process.note or "found checkpointed: where its copy lies is not known"
            continue
        if process.pid in before:
            after = discovery.anonymous_memory(process.pid)
            ranges = discovery.appeared(before[process.pid], after)
            process.region = ranges[0] if ranges else None
            process.device_bytes = ranges[0][1] - ranges[0][0] if ranges else 0
        else:
            ranges = [process.region] if process.region else []
        process.image, process.image_bytes = images.pages_within(
            directory, process.inner[0], ranges
        )
        if process.lane:
            process.image = process.lane[0].name
            process.image_bytes += sum(shard.size for shard in process.lane)
        # Half: a driver need not write all that NVML counts (H200, r580: 65 MB were missing).
        if process.image_bytes < _expected(process) // 2:
            lost.append(_told(process))
    if lost:
        raise NotInImages(
            "the images do not hold the device memory: " + "; ".join(lost) + ". Such a checkpoint "
            "would come back without it, and was not published"
        )


def _expected(process: Process) -> int:
    if process.held_bytes is not None:
        return process.held_bytes
    return max(process.device_bytes - MARGIN_BYTES, 0)


def _told(process: Process) -> str:
    held = "" if process.held_bytes is None else f"NVML said {size(process.held_bytes)} in use, "
    if not process.region:
        return f"{process}: {held}but no memory appeared in the process during the copy"
    start, end = process.region
    return (
        f"{process}: {held}the copy is {size(process.device_bytes)} at {start:x}-{end:x}, and "
        f"{process.image} holds {size(process.image_bytes)} of it"
    )
