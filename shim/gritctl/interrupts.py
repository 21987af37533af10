"""Ctrl-C, SIGTERM and SIGHUP while something is under way that must be undone: noted, not raised.

An exception in the middle of anything could lose the one call that has to be answered before a
container can be resumed. So whoever waits looks here, at places where it knows what there is to
undo; and what undoes cannot be interrupted itself.
"""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(Exception):
    """A job was interrupted; the text says that all was undone, or what was not."""


class Interrupts:
    """Within `with`, `came` is true once a signal has come."""

    def __init__(self) -> None:
        self.came = False
        self._before: list[tuple[signal.Signals, Any]] = []

    def __enter__(self) -> Interrupts:
        self._before = [(number, signal.signal(number, self._note)) for number in _SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
