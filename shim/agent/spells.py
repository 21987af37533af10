"""For how long something has been so, to one who looks at all resources again and again."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.agent.api import Object


class Spells:
    """Each look begins with `look`. What it does not ask for has ended, and may begin anew."""

    def __init__(self) -> None:
        self.since: dict[tuple[str, str], float] = {}
        """By the resource's uid and what is so, of the look under way, or the last one."""
        self._before: dict[tuple[str, str], float] = {}

    def look(self) -> None:
        self._before, self.since = self.since, {}

    def forget(self) -> None:
        """Silence while nobody could be heard is no sign of death."""
        self.since.clear()

    def seconds(self, one: Object, what: str) -> float:
        key = (one["metadata"]["uid"], what)
        self.since[key] = self._before.get(key, time.monotonic())
        return time.monotonic() - self.since[key]
