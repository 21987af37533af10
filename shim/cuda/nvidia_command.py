"""NVIDIA's `cuda-checkpoint` in the place of libcuda's calls, for drivers r555 to r569.

Those have the actions but no API for them. Same methods as `libcuda.LibCuda`, one run of the
command a call. Never used where libcuda has the calls: a run costs 15-25 ms, a call 0.4 ms.
"""

from __future__ import annotations

import subprocess

from shim.cuda import states
from shim.cuda.errors import LibraryError


class NvidiaCommand:
    """Runs `command`, the absolute path of NVIDIA's binary. It gives no error numbers, so a
    failure is a LibraryError with the command's own words."""

    def __init__(self, command: str) -> None:
        self.path = command

    def state(self, pid: int) -> tuple[int, int]:
        """As LibCuda.state. Every failure of the tid question means "no CUDA", as in CRIU."""
        if self.restore_tid(pid)[0] != states.SUCCESS:
            return states.NOT_INITIALIZED, 0
        status, text = self._run("--get-state", "--pid", str(pid))
        first_word = text.split(None, 1)[0] if text.split() else ""
        if status or first_word not in states.WORDS:
            raise LibraryError(f"{self.path} --get-state: exit status {status}: {text}")
        return states.SUCCESS, states.WORDS.index(first_word)

    def restore_tid(self, pid: int) -> tuple[int, int]:
        status, text = self._run("--get-restore-tid", "--pid", str(pid))
        if status == 0 and text.isdigit():
            return states.SUCCESS, int(text)
        return states.NOT_INITIALIZED, 0

    def lock(self, pid: int, timeout_ms: int) -> tuple[int, int]:
        return self._action("lock", pid, "--timeout", str(timeout_ms))

    def checkpoint(self, pid: int) -> tuple[int, int]:
        return self._action("checkpoint", pid)

    def restore(self, pid: int, device_map: str = "") -> tuple[int, int]:
        return self._action("restore", pid, *(("--device-map", device_map) if device_map else ()))

    def unlock(self, pid: int) -> tuple[int, int]:
        return self._action("unlock", pid)

    def _action(self, action: str, pid: int, *more: str) -> tuple[int, int]:
        status, text = self._run("--action", action, "--pid", str(pid), *more)
        if status:
            raise LibraryError(f"{self.path} --action {action}: exit status {status}: {text}")
        return states.SUCCESS, 0

    def _run(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [self.path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        return done.returncode, " ".join(done.stdout.split())
