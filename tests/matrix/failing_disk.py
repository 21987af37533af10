"""A disk in a node that fails, or stands still, when a test says so: see fuse_server.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from tests.e2e.gpu import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node

IMAGES = "/var/tmp/disk/here/checkpoint"
"""Where on it a checkpoint's image directory is to be."""

LANE = "/lane-"
"""In the path of each file of the lane's, and of no other; CRIU's pages are in others."""
PAGES = "/pages-"

_DISK = "/var/tmp/disk"
_SERVER = Path(__file__).with_name("fuse_server.py")
_BACKING = "/var/tmp/disk-backing"
_CONTROL = "/var/tmp/disk-control"
_UNMOUNT = """
import ctypes, sys
sys.exit(ctypes.CDLL(None).umount2(sys.argv[1].encode(), 2) and 1)
"""


class Disk:
    """One that is mounted. The operations are read, write, fsync, rename; `part`: only on files
    with that in their path."""

    def __init__(self, control: Path) -> None:
        self._control = control
        self._met = Path(f"{control}.met")

    def fail(self, operation: str, part: str = "") -> None:
        """It is answered with EIO from now on."""
        self._say(f"fail {operation} {part}")

    def slow(self, operation: str, part: str = "") -> None:
        """Each is answered late from now on."""
        self._say(f"slow {operation} {part}")

    def stop(self, operation: str, part: str = "") -> None:
        """All stands still from the next one on."""
        self._say(f"stop {operation} {part}")

    def stop_at(self, operation: str, part: str = "") -> None:
        """The same, and waits for it."""
        self.stop(operation, part)
        self.met()

    def met(self) -> None:
        """Waits until somebody has come by what it was told."""
        until("an operation on the disk", self._met.exists)

    def mend(self) -> None:
        self._say("")

    def _say(self, words: str) -> None:
        self._met.unlink(missing_ok=True)
        draft = self._control.with_suffix(".draft")
        draft.write_text(words)
        draft.rename(self._control)


@contextlib.contextmanager
def mounted(node: Node) -> Iterator[Disk]:
    """It is made, with room for a checkpoint, and taken away."""
    for directory in (_DISK, _BACKING):
        node.path(directory).mkdir(exist_ok=True)
    device = node.path("/dev/fuse")
    if not device.exists():
        os.mknod(device, 0o600 | 0o020000, os.makedev(10, 229))
    control = node.path(_CONTROL)
    argv = ["python3", "-c", _SERVER.read_text(), _DISK, _BACKING, _CONTROL]
    server = node.popen(argv)
    disk = Disk(control)
    try:
        mounts = node.path("/proc/1/mountinfo")
        until("the mount", lambda: f" {_DISK} " in mounts.read_text())
        node.path(IMAGES).parent.mkdir()
        yield disk
    finally:
        disk.mend()
        node.run(["python3", "-c", _UNMOUNT, _DISK])
        server.wait(10)
        node.run(["rm", "-rf", _DISK, _BACKING, _CONTROL, f"{_CONTROL}.met"])
