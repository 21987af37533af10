"""Whether a checkpoint can be restored on this node and in this container, found out before
anything of it is created: CPU, kernel, driver, sources of mounts. (devices.py matches GPUs,
injected.py mounts.)

Processes found out at their start what the CPU can do, and never ask again: on a CPU that lacks it
they die at some later time, of an illegal instruction. Only what is known to differ is told.
"""

from __future__ import annotations

import os

from shim import devices, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.container import Container
    from shim.manifest import Manifest

# What programs choose their code by (x86: the names of /proc/cpuinfo); the rest is the kernel's.
_CHOICES = """
abm adx aes bmi1 bmi2 clflushopt clwb clzero f16c fma fma4 fsgsbase gfni movbe movdir64b movdiri
pclmulqdq pku pni popcnt rdpid rdrand rdseed rtm sha512 sha_ni sm3 sm4 sse sse2 sse4_1 sse4_2 sse4a
ssse3 vaes vpclmulqdq waitpkg xgetbv1 xop xsave xsavec xsaveopt xsaves
"""
_INSTRUCTIONS = frozenset(_CHOICES.split())
_FAMILIES = ("amx", "avx", "apx")


class Mismatch(Exception):
    """A checkpoint that does not fit here; the message gives every reason. Nothing was created."""


def cpu() -> dict[str, str]:
    """This node's CPU: `architecture`, `model`, and `instructions`, separated by blanks."""
    facts: dict[str, str] = {}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    names = facts.get("flags", "").split()
    chosen = [n for n in names if n in _INSTRUCTIONS or n.startswith(_FAMILIES)]
    chosen += facts.get("Features", "").split()  # Arm
    return {
        "architecture": os.uname().machine,
        "model": facts.get("model name", ""),
        "instructions": " ".join(sorted(chosen)),
    }


def require(container: Container, spec: dict[str, Any], images: str, made: Manifest | None) -> None:
    """Raises Mismatch unless the images fit; only logs where `on_mismatch` is "warn"."""
    problems = _sources(spec)
    if made is not None:
        problems += _node(made)
    if not problems:
        return
    made_on = f", made on {made.hostname}," if made else ""
    told = f"container {container.id}: the checkpoint {images}{made_on} does not fit: "
    told += "; ".join(problems)
    if container.config.on_mismatch == "warn":
        log.warning(f"{told}; tried all the same, as on_mismatch is warn")
        return
    raise Mismatch(f'{told}. Nothing was started (on_mismatch = "warn" tries it all the same)')


def _node(made: Manifest) -> list[str]:
    problems = []
    here = cpu()
    if made.cpu and made.cpu["architecture"] != here["architecture"]:
        problems.append(
            f"it was made on {made.cpu['architecture']}, and this is {here['architecture']}"
        )
    elif made.cpu:
        lacking = set(made.cpu["instructions"].split()) - set(here["instructions"].split())
        if lacking:
            problems.append(
                f"the CPU ({here['model']}) lacks {', '.join(sorted(lacking))}, which the "
                f"processes found on theirs ({made.cpu['model']})"
            )
    kernel = os.uname().release
    if _release(kernel) < _release(made.kernel):
        problems.append(f"the kernel is {kernel}, older than theirs ({made.kernel})")
    driver = devices.driver_version()
    if made.cuda_processes and made.driver_version and made.driver_version != driver:
        found = f"the NVIDIA driver is {driver}" if driver else "there is no NVIDIA driver"
        problems.append(f"{found}, and they have that of {made.driver_version} mapped")
    return problems


def _sources(spec: dict[str, Any]) -> list[str]:
    problems = []
    for mount in spec.get("mounts") or []:
        source = str(mount.get("source", ""))
        bound = mount.get("type") == "bind" or {"bind", "rbind"} & set(mount.get("options") or ())
        if bound and source.startswith("/") and not os.path.exists(source):
            place = mount.get("destination")
            problems.append(f"the source {source} of the mount {place} is not there")
    return problems


def _release(text: str) -> tuple[int, int]:
    """(6, 18) of "6.18.44-generic"; (0, 0) of what is no such thing."""
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
