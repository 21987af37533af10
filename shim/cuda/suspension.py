"""What is known of a container whose GPU was taken away: plain data, written to the manifest.

Made by `engine.suspend`, used by `engine.resume`, and after a restore on another node by
`engine.resume_restored`. Holds no open file and no connection; survives a trip through JSON.
"""

from __future__ import annotations

from shim.cuda.discovery import Candidate
from shim.cuda.shards import Shard

TYPE_CHECKING = False  # as in `engine`
if TYPE_CHECKING:
    from typing import Any

    Plain = dict[str, Any]  # what JSON can hold

# {"at": seconds after the suspension (or the way back) began, "seconds": how long it took}
Step = dict[str, float]


class Process:
    """One CUDA process of the container.

    pid, start_time, inner, comm: as in discovery.Candidate.
    restore_tid: the driver's thread in it, 0 if unknown.
    before: the state it was found in. state: the last one the driver confirmed.
    steps: how long each step took: lock, checkpoint, restore, unlock.
    held_bytes: device memory it had in use when it was locked, its contexts' included, by NVML's
        word; None if that is not known (`note` then says why).
    gpus: the same by GPU, UUID -> bytes, as far as it is known.
    device_bytes, region: size and [start, end) of the memory region that appeared in the process
        while the driver copied: its device memory, on the host. 0 and None if none was seen.
    regions: all that appeared, the largest first.
    lane: the files that hold regions of it, which CRIU did not see then.
    dropped_to: the directory of these files, while the process lacks what is in them; else "".
    image, image_bytes: the file of the checkpoint that holds it, and how much of it was ever
        written to by the driver and so is there; "" and 0 as long as that is not known.
    note: what is odd about it, or "".
    """

    __slots__ = (
        "before",
        "comm",
        "device_bytes",
        "dropped_to",
        "gpus",
        "held_bytes",
        "image",
        "image_bytes",
        "inner",
        "lane",
        "note",
        "pid",
        "region",
        "regions",
        "restore_tid",
        "start_time",
        "state",
        "steps",
    )

    def __init__(
        self,
        pid: int,
        start_time: int,
        inner: tuple[int, ...],
        comm: str,
        *,
        restore_tid: int = 0,
        before: str = "",
        state: str = "",
        steps: dict[str, Step] | None = None,
        held_bytes: int | None = None,
        gpus: dict[str, int] | None = None,
        device_bytes: int = 0,
        region: tuple[int, int] | None = None,
        regions: list[tuple[int, int]] | None = None,
        lane: list[Shard] | None = None,
        dropped_to: str = "",
        image: str = "",
        image_bytes: int = 0,
        note: str = "",
    ) -> None:
        self.pid = pid
        self.start_time = start_time
        self.inner = tuple(inner)
        self.comm = comm
        self.restore_tid = restore_tid
        self.before = before
        self.state = state
        self.steps = steps if steps is not None else {}
        self.held_bytes = held_bytes
        self.gpus = gpus if gpus is not None else {}
        self.device_bytes = device_bytes
        self.region = region
        self.regions = regions if regions is not None else []
        self.lane = lane if lane is not None else []
        self.dropped_to = dropped_to
        self.image = image
        self.image_bytes = image_bytes
        self.note = note

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.comm})"

    def to_dict(self) -> Plain:
        plain: Plain = {name: getattr(self, name) for name in self.__slots__}
        plain["inner"] = list(self.inner)
        plain["region"] = list(self.region) if self.region else None
        plain["regions"] = [list(region) for region in self.regions]
        plain["lane"] = [shard.plain() for shard in self.lane]
        return plain

    @classmethod
    def from_dict(cls, plain: Plain) -> Process:
        """Raises KeyError or TypeError where `plain` was not made by to_dict."""
        region = plain["region"]
        return cls(
            **{
                **plain,
                "region": tuple(region) if region else None,
                "regions": [(start, end) for start, end in plain.get("regions", [])],
                "lane": [Shard(*shard) for shard in plain.get("lane", [])],
            }
        )


class Suspension:
    """The GPU side of a paused container. False where it has no CUDA process.

    engine: "driver", "plugin", or "none". processes: its CUDA processes.
    idle: those that had libcuda or a device open but no CUDA, as [pid, start time, devices]; what
        `engine.missed` compares with.
    forked: those of them that had inherited the GPU of one with CUDA, by pid, and why it could not
        be taken from them, "" where it was.
    library, cuda_version: as in driver.Library. seconds: how long the suspension took.
    """

    __slots__ = ("cuda_version", "engine", "forked", "idle", "library", "processes", "seconds")

    def __init__(self, engine: str = "none") -> None:
        self.engine = engine
        self.library = ""
        self.cuda_version = 0
        self.processes: list[Process] = []
        self.idle: list[tuple[int, int, bool]] = []
        self.forked: dict[int, str] = {}
        self.seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self.processes)

    def to_dict(self) -> Plain:
        return {
            "engine": self.engine,
            "library": self.library,
            "cuda_version": self.cuda_version,
            "seconds": self.seconds,
            "processes": [process.to_dict() for process in self.processes],
            "forked": {str(pid): problem for pid, problem in self.forked.items()},
            "idle": [list(entry) for entry in self.idle],
        }

    @classmethod
    def from_dict(cls, plain: Plain) -> Suspension:
        """Raises KeyError or TypeError where `plain` was not made by to_dict."""
        new = cls(plain["engine"])
        new.library = plain["library"]
        new.cuda_version = plain["cuda_version"]
        new.seconds = plain["seconds"]
        new.processes = [Process.from_dict(entry) for entry in plain["processes"]]
        new.forked = {int(pid): problem for pid, problem in plain["forked"].items()}
        new.idle = [(pid, start_time, devices) for pid, start_time, devices in plain["idle"]]
        return new


def from_candidate(candidate: Candidate) -> Process:
    """The record of a process that turned out to have CUDA."""
    return Process(candidate.pid, candidate.start_time, candidate.inner, candidate.comm)
