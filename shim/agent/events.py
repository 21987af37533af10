"""What becomes of a Checkpoint or Restore, as events: `kubectl describe` and `get events` tell.

They are for people: one that cannot be written is dropped, and nothing waits for any.
"""

from __future__ import annotations

import hashlib
import queue
import threading

from shim.agent.api import GROUP, VERSION, ApiError, Conflict
from shim.agent.status import now

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import EventsApi, Object

KINDS = {"Checkpointed": "Checkpoint", "Restored": "Restore"}
"""By the condition that each has."""
_TROUBLE = ("NotMigrated", "NotRemoved", "OtherProgram", "OtherSpec", "PodPaused")
_MESSAGE_CHARACTERS = 1024
_WAITING = 100
_KNOWN = 1000


class Events:
    """`changed` takes a resource whose status was written. A thread of its own writes the event;
    `say` takes lines for the log, the first of several failures only."""

    def __init__(self, api: EventsApi, node: str, say: Callable[[str], None]) -> None:
        self._api, self._node, self._say = api, node, say
        self._told: dict[str, str] = {}
        self._failing = False
        self._queue: queue.Queue[Object] = queue.Queue(_WAITING)
        threading.Thread(target=self._write, daemon=True).start()

    def changed(self, one: Object) -> None:
        """Never raises, never waits."""
        try:
            event = of(one, self._node)
            uid, name = one["metadata"]["uid"], event["metadata"]["name"]
            if self._told.get(uid) == name:
                return  # a claim was renewed
            if len(self._told) >= _KNOWN:
                self._told.clear()  # told again, they are there already
            self._told[uid] = name
            self._queue.put_nowait(event)
        except (LookupError, TypeError, ValueError, queue.Full):
            pass

    def settle(self) -> None:
        """Until all that is known is written or dropped."""
        self._queue.join()

    def _write(self) -> None:
        while True:
            event = self._queue.get()
            try:
                self._api.create(event)
                self._failing = False
            except Conflict:
                pass  # it is there already
            except Exception as error:
                if not self._failing:
                    kind = "" if isinstance(error, ApiError) else type(error).__name__
                    self._say(f"events are not written: {kind}{error}. Nothing else hangs on them")
                self._failing = True
            finally:
                self._queue.task_done()


def of(one: Object, node: str) -> Object:
    """The event of a resource's present condition, of the same name however often it is told.
    Raises LookupError, TypeError or ValueError if others have filled its status."""
    meta, status = one["metadata"], one["status"]
    found: dict[str, Any] = {each["type"]: each for each in status["conditions"]}
    (condition,) = found.keys() & KINDS.keys()
    phase, reason = status["phase"], found[condition]["reason"]
    text = found[condition]["message"]
    trouble = phase == "Failed" or reason in _TROUBLE
    told = "\n".join((meta["uid"], phase, reason, text))
    when = now()
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "namespace": meta["namespace"],
            "name": f"{meta['name'][:230]}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
        },
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KINDS[condition],
            "namespace": meta["namespace"],
            "name": meta["name"],
            "uid": meta["uid"],
        },
        "type": "Warning" if trouble else "Normal",
        "reason": reason if trouble else phase,
        "message": text[:_MESSAGE_CHARACTERS],
        "source": {"component": "grit-agent", "host": node},
        "firstTimestamp": when,
        "lastTimestamp": when,
        "count": 1,
    }
