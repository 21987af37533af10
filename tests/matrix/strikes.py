"""What is done to one process, found in the middle of its work."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import until

if TYPE_CHECKING:
    from collections.abc import Iterator

KILLED, STOPPED, AT_ITS_LIMIT = "killed", "stopped", "at its memory limit"

_MEMORY = Path("/sys/fs/cgroup/memory")
_GROUP = _MEMORY / f"grit-matrix-{os.getpid()}"
_FIRST_TO_GO = "1000"  # proc_pid_oom_score_adj(5): before what it starts

needs_memory_groups = pytest.mark.skipif(
    not _MEMORY.is_dir(), reason="this host has no v1 memory controller"
)
FAULTS = [KILLED, STOPPED, pytest.param(AT_ITS_LIMIT, marks=needs_memory_groups)]


@contextlib.contextmanager
def struck(pid: int, fault: str) -> Iterator[None]:
    """The process, by its pid on the host, is `killed`, `stopped`, or, `at its memory limit`, in a
    control group of its own in which it gets no page more: the kernel ends it, within this, as soon
    as it asks for one."""
    if fault == KILLED:
        os.kill(pid, signal.SIGKILL)
    elif fault == STOPPED:
        os.kill(pid, signal.SIGSTOP)
    else:
        with _memory_limit(pid):
            yield
        return
    yield


@contextlib.contextmanager
def _memory_limit(pid: int) -> Iterator[None]:
    _GROUP.mkdir(exist_ok=True)
    left = _GROUP / "cgroup.procs"
    try:
        (_GROUP / "memory.limit_in_bytes").write_text("0")
        Path(f"/proc/{pid}/oom_score_adj").write_text(_FIRST_TO_GO)
        left.write_text(str(pid))
        yield
        assert "oom_kill 0" not in (_GROUP / "memory.oom_control").read_text(), "no limit was hit"
    finally:
        until("the end of all at the limit", lambda: not left.read_text())
        _GROUP.rmdir()
