"""What both resources have in their status: phase, conditions, times. And their names."""

from __future__ import annotations

import datetime

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.agent.api import Object


def set_phase(one: Object, phase: str, condition: str, reason: str, text: str) -> None:
    """Sets the phase, and the condition of that type: True in the phase of its own name and
    in those that follow it."""
    status = one.setdefault("status", {})
    status["phase"] = phase
    done = (condition, "Submitting", "Submitted")
    truth = "True" if phase in done else "False" if phase == "Failed" else "Unknown"
    conditions = status.setdefault("conditions", [])
    before: dict[str, Any] = next((each for each in conditions if each["type"] == condition), {})
    same = before.get("status") == truth
    status["conditions"] = [each for each in conditions if each["type"] != condition] + [
        {
            "type": condition,
            "status": truth,
            "reason": reason,
            "message": text[:32768],
            "lastTransitionTime": before["lastTransitionTime"] if same else now(),
        }
    ]


def now(ahead: float = 0) -> str:
    """The time, `ahead` seconds from now, as Kubernetes writes it."""
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead)
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def name_of(one: Object) -> str:
    return f"{one['metadata']['namespace']}/{one['metadata']['name']}"


def age(one: Object) -> tuple[str, str]:
    """To sort by, the oldest first."""
    return (one["metadata"].get("creationTimestamp", ""), name_of(one))
