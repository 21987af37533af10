"""A process on the simulated GPU that does what a test tells it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.simgpu.simgpu import SimGpu

PROGRAM = Path(__file__).with_name("workload.py")


class Workload:
    """A process on the board that does what it is told, one command a line."""

    def __init__(self, board: SimGpu, *, before: tuple[str, ...] = ()) -> None:
        self.process = subprocess.Popen(
            [*before, sys.executable, str(PROGRAM), str(board.kit.libcuda)],
            env={**os.environ, **board.host_env()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        assert self._line() == "ready"

    def do(self, command: str) -> str:
        """Runs a command and waits for its answer."""
        assert self.process.stdin
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self._line()

    def kill(self) -> None:
        """With everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the workload ended"
        return line.strip()
