"""What NVML says of a node's GPUs and of the processes on them, as the helper tells it to the shim.

Plain data and its one line of text; NVML itself is in `nvml`. Lean: lives in the shim.
"""

from __future__ import annotations


class Device:
    """A GPU: its `uuid` ("GPU-..."), memory in bytes, and whether it is split by MIG."""

    __slots__ = ("free", "mig", "total", "uuid")

    def __init__(self, uuid: str, total: int, free: int, mig: bool) -> None:
        self.uuid = uuid
        self.total = total
        self.free = free
        self.mig = mig


class Use:
    """One process on one GPU. `bytes` of device memory in use, contexts included, None where NVML
    does not know; `mig`: on a MIG instance; `mps`: as a client of MPS."""

    __slots__ = ("bytes", "mig", "mps", "pid", "uuid")

    def __init__(self, uuid: str, pid: int, bytes_: int | None, mig: bool, mps: bool) -> None:
        self.uuid = uuid
        self.pid = pid
        self.bytes = bytes_
        self.mig = mig
        self.mps = mps


class Survey:
    """All GPUs of the node, and the asked-for processes on them. Empty where NVML cannot say;
    `unknown` is why."""

    __slots__ = ("devices", "unknown", "uses")

    def __init__(
        self, devices: list[Device] | None = None, uses: list[Use] | None = None, unknown: str = ""
    ) -> None:
        self.devices = devices or []
        self.uses = uses or []
        self.unknown = unknown

    def used(self, pid: int) -> int | None:
        """Bytes of device memory of a process on all GPUs; None where that is not known."""
        figures = [use.bytes for use in self.uses if use.pid == pid]
        known = [figure for figure in figures if figure is not None]
        return sum(known) if known and len(known) == len(figures) else None

    def used_on(self, uuid: str) -> int:
        """Bytes that the processes of this survey have in use on one GPU, as far as is known."""
        return sum(use.bytes or 0 for use in self.uses if use.uuid == uuid)

    def encode(self) -> str:
        """One line without white space: `GPU,total,free,mig;...|GPU,pid,bytes,mig,mps;...`"""
        devices = [f"{d.uuid},{d.total},{d.free},{d.mig:d}" for d in self.devices]
        uses = [
            f"{u.uuid},{u.pid},{'' if u.bytes is None else u.bytes},{u.mig:d},{u.mps:d}"
            for u in self.uses
        ]
        return ";".join(devices) + "|" + ";".join(uses)

    @classmethod
    def decode(cls, text: str) -> Survey:
        """Raises ValueError where `text` is not what `encode` makes."""
        devices, _, uses = text.partition("|")
        new = cls()
        for uuid, total, free, mig in (d.split(",") for d in devices.split(";") if d):
            new.devices.append(Device(uuid, int(total), int(free), mig == "1"))
        for uuid, pid, figure, mig, mps in (u.split(",") for u in uses.split(";") if u):
            known = int(figure) if figure else None
            new.uses.append(Use(uuid, int(pid), known, mig == "1", mps == "1"))
        return new
