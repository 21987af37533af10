"""GPUs by UUID: those of the node, those a container was given, and which takes the place of which
when a checkpoint is restored on other ones.

The driver must be told a successor for every GPU of a checkpoint if it is told any, and takes only
the same type (driver API r580: cuCheckpointProcessRestore). This file reads /proc and /dev; it
never asks the driver.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Gpu = dict[str, str]

ANNOTATION = "grit.dev/device-map"
"""On the container: "GPU-old=GPU-new,...", where the successors are not to be found out here."""

_PROC = "/proc/driver/nvidia"


class DeviceError(Exception):
    """The GPUs of a checkpoint and those of the container to be restored do not fit."""


def driver_version() -> str | None:
    """The kernel driver's version, "580.159.04", None without one."""
    try:
        with open(f"{_PROC}/version", encoding="ascii", errors="replace") as file:
            words = file.readline().split()
    except OSError:
        return None
    return next((word for word in words if word[:1].isdigit() and "." in word), None)


def installed() -> dict[int, Gpu]:
    """The node's GPUs, `uuid` and `name`, by the number in /dev/nvidia<number>."""
    found = {}
    root = f"{_PROC}/gpus"
    for slot in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        with open(os.path.join(root, slot, "information"), encoding="utf-8") as file:
            facts = dict(line.partition(":")[::2] for line in file)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        minor = int(facts.get("Device Minor", "-1"))
        found[minor] = {"uuid": facts.get("GPU UUID", ""), "name": facts.get("Model", "")}
    return found


def of_running(pid: int) -> list[Gpu]:
    """The GPUs whose devices the container of process `pid` sees, however they got there."""
    try:
        names = os.listdir(f"/proc/{pid}/root/dev")
    except OSError:
        return []
    return _numbered(names)


def of_spec(spec: dict[str, Any]) -> list[Gpu]:
    """The GPUs a specification names; none where a hook is to bring them (nvidia's legacy mode)."""
    devices = (spec.get("linux") or {}).get("devices") or []
    return _numbered([os.path.basename(str(device.get("path", ""))) for device in devices])


def _numbered(names: list[str]) -> list[Gpu]:
    known = installed()
    numbers = [int(n[6:]) for n in names if n.startswith("nvidia") and n[6:].isdigit()]
    return [known[number] for number in sorted(numbers) if number in known]


def successors(old: list[Gpu], new: list[Gpu], named: str = "") -> str:
    """The device map "GPU-old=GPU-new,..." for a restore, "" where none is needed.

    `named` is the user's own, which must name every old GPU. Otherwise a GPU that is there again
    stays itself, and each other gets the first free one of its type. Raises DeviceError with what
    does not fit. Where either side is unknown (empty), it is left to the driver to say.
    """
    if named:
        missing = {gpu["uuid"] for gpu in old} - {p.partition("=")[0] for p in named.split(",")}
        if missing:
            raise DeviceError(
                f"the annotation {ANNOTATION} names no successor for {', '.join(sorted(missing))}: "
                "the driver wants one for every GPU of the checkpoint"
            )
        return named
    if not old or not new:
        return ""
    free = {gpu["uuid"]: gpu["name"] for gpu in new}
    if all(gpu["uuid"] in free for gpu in old):
        return ""
    pairs = {gpu["uuid"]: gpu["uuid"] for gpu in old if free.pop(gpu["uuid"], None)}
    for gpu in old:
        if gpu["uuid"] in pairs:
            continue
        fit = next((uuid for uuid, name in free.items() if name == gpu["name"]), None)
        if fit is None:
            raise DeviceError(
                f"no GPU for the checkpoint's {gpu['name']} ({gpu['uuid']}): of the {len(new)} the "
                f"container was given, {_listed(free)} are free, and the type must be the same"
            )
        del free[fit]
        pairs[gpu["uuid"]] = fit
    return ",".join(f"{before}={after}" for before, after in pairs.items())


def _listed(gpus: dict[str, str]) -> str:
    return ", ".join(f"{name} ({uuid})" for uuid, name in gpus.items()) or "none"
