"""The clock of a paused container: who starts, stops and survives it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from shim import watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

FAR = 3600.0


class Pod:
    """Notes what it is asked to abandon, and resumes it from the second time on."""

    def __init__(self) -> None:
        self.asked = 0
        self.wanted = True
        self.done = threading.Event()

    def abandon(self, one: Any, why: str, still: Callable[[], bool]) -> None:
        self.wanted = still()
        self.asked += 1
        if self.asked == 2:
            one.paused_by = None
            self.done.set()


def container(limit: float, paused_by: int | None = 1) -> Any:
    return SimpleNamespace(
        config=SimpleNamespace(pause_timeout=limit), paused_by=paused_by, watch=None
    )


@pytest.mark.parametrize(("limit", "paused_by"), [(0.0, 1), (FAR, None)], ids=["never", "runs"])
def test_no_clock(limit: float, paused_by: int | None) -> None:
    one = container(limit, paused_by)
    watchdog.start(one, Pod())  # type: ignore[arg-type]
    assert one.watch is None


def test_asks_again_where_it_could_not_be_resumed() -> None:
    one, pod = container(0.01), Pod()
    watchdog.start(one, pod)  # type: ignore[arg-type]
    assert pod.done.wait(30)
    assert pod.wanted


def test_a_client_that_comes_in_time() -> None:
    one, pod = container(FAR), Pod()
    watchdog.start(one, pod)  # type: ignore[arg-type]
    clock = one.watch
    watchdog.stop(one)
    assert clock.finished.is_set()
    clock.function()  # it had begun already, and waits for the container's lock
    assert not pod.wanted
    assert one.watch is None
