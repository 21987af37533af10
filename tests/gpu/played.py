"""A node of several that one machine plays: it has its own containerd, its own host name, and its
own view of /run, where all lies that grit and containerd have in fixed places. Processes, network,
other files and control groups are the machine's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.gpu.machine import HOME, Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

_STAND = """\
set -e
mount -t tmpfs -o mode=0755 run /run
hostname "$1" || echo "$1" > /proc/sys/kernel/hostname
echo stands
exec cat
"""
"""Until the end of its input, so that a test that is killed leaves none."""


class PlayedNode(Machine):
    """Stands within `with`; `path` and `run` are of its view."""

    def __init__(self, name: str) -> None:
        super().__init__(HOME.with_name("grit-gpu-nodes") / name)
        self.name = name
        self._keeper: subprocess.Popen[str] | None = None

    def __enter__(self) -> PlayedNode:
        words = ["unshare", "--mount", "--uts", "sh", "-c", _STAND, "node", self.name]
        pipe = subprocess.PIPE
        self._keeper = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True)
        try:
            assert self._keeper.stdout
            assert self._keeper.stdout.readline() == "stands\n", f"{self.name} does not stand"
            self._end_earlier()
            shutil.rmtree(self.home, ignore_errors=True)
            self.home.mkdir(parents=True)
            super().__enter__()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self._keeper:
            self._keeper.communicate()
            self._keeper = None

    def path(self, path: str) -> Path:
        """The machine's view of a path of the node."""
        assert self._keeper
        return Path(f"/proc/{self._keeper.pid}/root", path.lstrip("/"))

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return super().popen(self._entered(argv), **options)

    def run(self, argv: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return super().run(self._entered(argv), **options)

    def _entered(self, argv: Sequence[str]) -> list[str]:
        assert self._keeper
        enter = ["nsenter", f"--target={self._keeper.pid}", "--mount", "--uts"]
        return [*enter, "--", *map(str, argv)]
