"""GPUs by UUID: those of the node, those a container was given, and which takes the place of which
when a checkpoint is restored on other ones.

The driver must be told a successor for every GPU of a checkpoint if it is told any, and takes only
the same type, with room enough (driver API r580: cuCheckpointProcessRestore). This file reads
/proc and /dev; it never asks the driver.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Gpu = dict[str, str]

ANNOTATION = "grit.dev/device-map"
"""On the container: "GPU-old=GPU-new,...", where the successors are not to be found out here."""

_PROC = "/proc/driver/nvidia"
_PREFIX = "/dev/nvidia"
_VISIBLE = "NVIDIA_VISIBLE_DEVICES"
"""How nvidia-container-runtime is told which GPUs to give: "all", or numbers in the order of the
PCI bus, or UUIDs; "void" and "none" for none."""


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
    """The node's GPUs, `uuid`, `name` and `minor`, by the last: the number in /dev/nvidia<minor>.
    In the order of the PCI bus, which is NVML's, too."""
    found = {}
    root = f"{_PROC}/gpus"
    for slot in sorted(os.listdir(root)) if os.path.isdir(root) else []:
        with open(os.path.join(root, slot, "information"), encoding="utf-8") as file:
            facts = dict(line.partition(":")[::2] for line in file)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        minor = int(facts.get("Device Minor", "-1"))
        found[minor] = {
            "uuid": facts.get("GPU UUID", ""),
            "name": facts.get("Model", ""),
            "minor": str(minor),
        }
    return found


def of_running(pid: int) -> list[Gpu]:
    """The GPUs whose devices the container of process `pid` sees, however they got there."""
    return _numbered(nodes(f"/proc/{pid}/root/dev"))


def of_spec(spec: dict[str, Any], runtime: str = "") -> list[Gpu]:
    """The GPUs a container is given: by its specification's devices, or else, where a hook of
    NVIDIA's or a `runtime` with NVIDIA's name is to bring them, by what that one goes by. None
    where it cannot be known."""
    listed = (spec.get("linux") or {}).get("devices") or []
    named = _numbered([str(device.get("path", "")) for device in listed])
    if named:
        return named
    hooks = spec.get("hooks") or {}
    words = [
        [str(hook.get("path", "")), *map(str, hook.get("args") or [])]
        for stage in ("prestart", "createRuntime")
        for hook in hooks.get(stage) or []
    ]
    nvidias = [line for line in words if any(is_nvidias(word) for word in line)]
    if not nvidias and "nvidia" not in os.path.basename(runtime):
        return []
    # nvidia-container-cli has them as an argument, as `ctr run --gpus` calls it.
    for word in (word for line in nvidias for word in line):
        if word.startswith("--device="):
            return _chosen(word.partition("=")[2])
    env = (spec.get("process") or {}).get("env") or []
    visible = [str(e).partition("=")[2] for e in env if str(e).startswith(f"{_VISIBLE}=")]
    return _chosen(visible[-1]) if visible else []


def named_in(spec: dict[str, Any]) -> bool:
    """Whether the specification itself has NVIDIA devices, and with them the right to use them."""
    listed = (spec.get("linux") or {}).get("devices") or []
    return any(str(device.get("path", "")).startswith(_PREFIX) for device in listed)


def is_nvidias(command: str) -> bool:
    """Whether a hook's path or argument names a program of NVIDIA's container toolkit."""
    name = os.path.basename(command)
    return name.startswith("nvidia-container-") or name in ("nvidia-ctk", "nvidia-cdi-hook")


def nodes(dev: str) -> list[str]:
    """The NVIDIA device files in a /dev directory, as paths below "/dev"."""
    found = []
    for place in ("", "nvidia-caps/"):
        try:
            names = sorted(os.listdir(os.path.join(dev, place)))
        except OSError:
            continue
        found += [f"/dev/{place}{name}" for name in names if name.startswith("nvidia")]
    return [path for path in found if path != "/dev/nvidia-caps"]


def number(path: str) -> int | None:
    """/dev/nvidia1 -> 1; None for any other device file."""
    text = path.removeprefix(_PREFIX)
    return int(text) if text != path and text.isdigit() else None


def _numbered(paths: list[str]) -> list[Gpu]:
    known = installed()
    numbers = [n for path in paths if (n := number(path)) is not None]
    return [known[n] for n in sorted(numbers) if n in known]


def _chosen(words: str) -> list[Gpu]:
    every = list(installed().values())
    if words == "all":
        return every
    chosen = []
    for word in words.split(","):
        if word.isdigit() and int(word) < len(every):
            chosen.append(every[int(word)])
        else:
            chosen += [gpu for gpu in every if word.startswith("GPU-") and gpu["uuid"] == word]
    return chosen


def successors(
    old: list[Gpu],
    new: list[Gpu],
    named: str = "",
    *,
    held: dict[str, int] | None = None,
    free: dict[str, int] | None = None,
) -> str:
    """The device map "GPU-old=GPU-new,..." for a restore, "" where none is needed.

    `named` is the user's own, which must name every old GPU. Otherwise a GPU that is there again
    stays itself, and each other gets the first free one of its type with room. `held`: bytes in
    use by the checkpoint on each old GPU; `free`: on each of the node's; what is not in them is
    not held against anything. Raises DeviceError with what does not fit. Where either side is
    unknown (empty), it is left to the driver to say.
    """
    held, free = held or {}, free or {}

    def against(before: Gpu, after: Gpu) -> str:
        if after["name"] != before["name"]:
            return f"is another type ({after['name']})"
        need, room = held.get(before["uuid"], 0), free.get(after["uuid"])
        if room is not None and room < need:
            return f"has {room >> 20} MiB free, {need >> 20} MiB are needed"
        return ""

    if named:
        return _named_by_the_user(old, new, named, against)
    if not old or not new:
        return ""
    given = {gpu["uuid"]: gpu for gpu in new}
    pairs = {
        gpu["uuid"]: gpu["uuid"]
        for gpu in old
        if gpu["uuid"] in given and not against(gpu, given[gpu["uuid"]])
    }
    if len(pairs) == len(old):
        return ""
    left = [gpu for gpu in new if gpu["uuid"] not in pairs]
    # Who needs most first: then whoever is found a place takes none that another needs.
    for gpu in sorted(old, key=lambda gpu: -held.get(gpu["uuid"], 0)):
        if gpu["uuid"] in pairs:
            continue
        fit = next((one for one in left if not against(gpu, one)), None)
        if fit is None:
            others = ", ".join(f"{_text(one)} {against(gpu, one)}" for one in left) or "none"
            raise DeviceError(
                f"no GPU for the checkpoint's {_text(gpu)}: it had {len(old)}, the container was "
                f"given {len(new)}, and of those not taken yet: {others}. The type must be the same"
            )
        left.remove(fit)
        pairs[gpu["uuid"]] = fit["uuid"]
    return ",".join(f"{before}={after}" for before, after in pairs.items())


def _named_by_the_user(
    old: list[Gpu], new: list[Gpu], named: str, against: Callable[[Gpu, Gpu], str]
) -> str:
    pairs = dict(pair.partition("=")[::2] for pair in named.split(","))
    wrong = f"the annotation {ANNOTATION}={named}"
    if not all(pairs.values()) or len(pairs) != named.count(",") + 1:
        raise DeviceError(f"{wrong} is not OLD=NEW,... with two GPU UUIDs each")
    if len(set(pairs.values())) < len(pairs):
        raise DeviceError(f"{wrong} names a GPU as the successor of two")
    missing = sorted({gpu["uuid"] for gpu in old} - pairs.keys())
    if missing:
        raise DeviceError(
            f"{wrong} names no successor for {', '.join(missing)}: the driver wants one for every "
            "GPU of the checkpoint"
        )
    given = {gpu["uuid"]: gpu for gpu in new}
    for gpu in old:
        after = pairs[gpu["uuid"]]
        if given and after not in given:
            had = ", ".join(map(_text, new))
            raise DeviceError(f"{wrong}: the container was not given {after}, but {had}")
        why = against(gpu, given[after]) if given else ""
        if why:
            raise DeviceError(f"{wrong}: {after}, for {_text(gpu)}, {why}")
    return named


def _text(gpu: Gpu) -> str:
    return f"{gpu['name']} ({gpu['uuid']})"
