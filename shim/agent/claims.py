"""What is written into a Restore, and what is looked up for it: for the two that move it,
restores.py by what befalls it and answers.py by what containers ask.
"""

from __future__ import annotations

import time

from shim.agent.status import name_of, now, set_phase
from shim.gritctl import stored
from shim.gritctl.stored import NotACheckpoint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Api, Object
    from shim.agent.settings import Settings
    from shim.gritctl.stored import Stored

CONDITION = "Restored"
HELD = (
    "The pod does not start as long as this Restore is there: delete it, and the pod starts from "
    "its beginning"
)


class Claims:
    """The Restores of the API server, as the agent of this node may move them. What talks to the
    server raises ApiError, Conflict if somebody was faster."""

    def __init__(
        self, api: Api, checkpoints: Api, settings: Settings, say: Callable[[str], None]
    ) -> None:
        self.api, self.settings, self.say = api, settings, say
        self._checkpoints = checkpoints
        self._renewed: dict[str, float] = {}

    def ours(self, one: Object) -> bool:
        """Whether it was claimed for a pod of this node."""
        found: str = one.get("status", {}).get("nodeName", "")
        return found == self.settings.node

    def hold(self, one: Object) -> Object | None:
        """Writes the status, and that the claim is ours for another while; None if the Restore has
        gone."""
        holder = {"name": self.settings.node, "until": now(self.settings.lease_seconds)}
        one["status"]["holder"] = holder
        self._renewed[one["metadata"]["uid"]] = time.monotonic()
        return self.api.put_status(one)

    def renew(self, one: Object) -> None:
        since = time.monotonic() - self._renewed.get(one["metadata"]["uid"], 0)
        if since > self.settings.lease_seconds / 3:
            self.hold(one)

    def move(self, one: Object, phase: str, reason: str, text: str) -> None:
        """Writes phase and condition, and the time if it is the end."""
        set_phase(one, phase, CONDITION, reason, text)
        if phase in ("Restored", "Failed"):
            one["status"]["finishedAt"] = now()
        self.api.put_status(one)
        self.say(f"restore {name_of(one)} is {phase}: {text}")

    def fail(self, one: Object, reason: str, text: str) -> None:
        self.move(one, "Failed", reason, text)

    def checkpoint_of(self, one: Object) -> Object | None:
        return self._checkpoints.get(one["metadata"]["namespace"], one["spec"]["checkpointName"])

    def saved(self, directory: str) -> dict[str, Stored]:
        """The containers that were saved, by name; "" for one that was saved alone. Raises
        CheckpointDirError or NotACheckpoint."""
        if not self.settings.holds(directory):
            raise NotACheckpoint(f"{directory} is in no store of this agent")
        return {one.name: one for one in stored.open_all(directory)}


def condition(one: Object) -> dict[str, Any]:
    """Its condition, {} before it has one."""
    found = one.get("status", {}).get("conditions", [])
    return next((each for each in found if each["type"] == CONDITION), {})
