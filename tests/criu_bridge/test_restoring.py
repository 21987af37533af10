"""The watch over a restore, with plain processes in the places of runc and CRIU."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from shim.criu_bridge.restoring import DIED, Watch

_PR_SET_CHILD_SUBREAPER = 36

# "runc" starts "criu", which starts a process that it is to bring back and ends at once; "runc"
# waits until nobody holds the socket any more. It begins when its input is closed.
RUNC = """
import os, signal
os.read(0, 1)
ours, theirs = os.pipe()
if not os.fork():
    with open("/proc/self/comm", "w") as comm:
        comm.write("criu")
    restored = os.fork()
    if not restored:
        os.kill(os.getpid(), signal.SIGSTOP)
    os.waitid(os.P_PID, restored, os.WSTOPPED)
    print(restored, flush=True)
    os._exit(0)
os.close(theirs)
os.read(ours, 1)
"""


@pytest.fixture
def subreaper() -> Iterator[None]:
    """We are whose children those become that lose their parents, as an inner shim is."""
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.usefixtures("subreaper")
def test_what_lost_its_parent_unseen_is_ended_too() -> None:
    """CRIU can be killed before anybody has looked at what it started."""
    command = [sys.executable, "-c", RUNC, "restore", "/bundle"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runc,
        Watch(os.getpid(), "/bundle", 60) as watch,
    ):
        assert runc.stdin and runc.stdout
        runc.stdin.close()
        restored = int(runc.stdout.readline())
        try:
            assert runc.wait(30) == 0
        finally:
            os.kill(restored, signal.SIGKILL)
            os.waitpid(restored, 0)
    assert watch.ended == DIED
