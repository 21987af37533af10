"""What NVIDIA's driver cannot checkpoint, and how a process shows that it uses it.

Only what /proc or NVML say for certain is a reason to refuse (`reasons`). For the rest there is no
sure sign from outside: an open /dev/nvidia-uvm, for one, is normal for every CUDA process. That is
kept for the error of a driver that did refuse (`suspects`). Never asks the driver. Lean.

Sources: the README of NVIDIA's cuda-checkpoint (r570: no UVM or IPC memory) and its issues 42 (MIG:
the copy ends with "out of memory") and 56 (IPC since r610); the README of CRIU's CUDA plugin (no
UVM, MIG, MPS).
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.cuda.survey import Survey

KNOWN_UP_TO = 615
"""The newest driver of which these limits are known: with a later one the driver is asked."""
IPC_SINCE = 610

_CAPABILITIES = "/dev/nvidia-caps/nvidia-cap"
_MIG_MINORS = "/proc/driver/nvidia-caps/mig-minors"
"""Lines of a name and a number: "config 1", "monitor 2", "gpu0/gi1/access 12", ..."""
_MPS_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_MPS_DEFAULT = "/tmp/nvidia-mps"


def major(driver_version: str | None) -> int | None:
    """ "580.159.04" -> 580."""
    head = (driver_version or "").partition(".")[0]
    return int(head) if head.isdigit() else None


def reasons(pid: int, survey: Survey, driver: int | None) -> list[str]:
    """Why this driver cannot checkpoint the process, each with what shows it; empty if nothing is
    known against it. `driver` is the major version, None where that is not known."""
    if driver is not None and driver > KNOWN_UP_TO:
        return []
    found = []
    capability = _capability_of_an_instance(pid)
    instance = next((use for use in survey.uses if use.pid == pid and use.mig), None)
    if capability or instance:
        evidence = f"holds {capability} open" if capability else ""
        if instance:
            evidence = f"NVML lists it on a MIG instance of {instance.uuid}"
        found.append(f"is on a MIG instance ({evidence}), which the driver cannot checkpoint")
    client = next((use for use in survey.uses if use.pid == pid and use.mps), None)
    if client:
        found.append(
            f"is a client of MPS (NVML lists it so on {client.uuid}), which the driver cannot "
            "checkpoint"
        )
    return found


def suspects(pid: int) -> str:
    """Words to follow a driver's refusal: what in the process may be its reason; "" if nothing."""
    found = []
    uvm = _uvm_mappings(pid)
    if uvm:
        found.append(
            f"managed (UVM) memory, if some of the {uvm >> 20} MiB mapped from /dev/nvidia-uvm are"
        )
    found.append(f"CUDA IPC memory, if shared with another process (driver before r{IPC_SINCE})")
    if _capability_of_an_instance(pid):
        found.append("MIG")
    control = _mps_control(pid)
    if control:
        found.append(f"MPS, whose control socket {control} it can reach")
    return "; the driver cannot checkpoint " + ", ".join(found)


def _capability_of_an_instance(pid: int) -> str:
    """The capability file of a MIG instance that the process holds open, "" if none."""
    directory = f"/proc/{pid}/fd"
    try:
        with open(_MIG_MINORS, encoding="ascii") as file:
            instances = {line.split()[1] for line in file if line.startswith("gpu")}
        names = os.listdir(directory)
    except OSError:
        return ""
    for name in names:
        try:
            target = os.readlink(f"{directory}/{name}")
        except OSError:
            continue
        if target.startswith(_CAPABILITIES) and target.removeprefix(_CAPABILITIES) in instances:
            return target
    return ""


def _uvm_mappings(pid: int) -> int:
    """Bytes mapped from /dev/nvidia-uvm. Managed memory is among them, and some of CUDA's own."""
    total = 0
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            for line in file:
                if line.rstrip().endswith(b"/dev/nvidia-uvm"):
                    start, _, end = line.split(None, 1)[0].partition(b"-")
                    total += int(end, 16) - int(start, 16)
    except OSError:
        pass
    return total


def _mps_control(pid: int) -> str:
    """MPS's control socket where the process's CUDA would look for it, "" if there is none."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except OSError:
        return ""
    named = [e.partition(b"=")[2] for e in entries if e.startswith(_MPS_PIPES.encode() + b"=")]
    control = os.path.join(os.fsdecode(named[-1]) if named else _MPS_DEFAULT, "control")
    return control if os.path.exists(f"/proc/{pid}/root{control}") else ""
