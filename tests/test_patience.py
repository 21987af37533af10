"""Work on a disk that may never answer."""

from __future__ import annotations

import threading

import pytest

from shim.patience import DiskHangs, within


def test_what_the_work_returns_or_raises() -> None:
    assert within(60, "it was not done", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60, "it was not done", lambda: 1 // 0)


def test_what_hangs_is_left_to_itself() -> None:
    answers, done = threading.Event(), threading.Event()

    def work() -> None:
        answers.wait()
        done.set()

    with pytest.raises(DiskHangs, match=r"^it was not done within 0.01 s: the disk"):
        within(0.01, "it was not done", work)
    assert not done.is_set()
    answers.set()
    assert done.wait(30)
