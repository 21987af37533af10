"""The shim's daemon held, failed or killed right before a phase of a checkpoint or of a restore."""

from __future__ import annotations

import contextlib
import errno
import os
import select
from typing import TYPE_CHECKING

from tests.e2e.gpu import FAILPOINTS, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node


class Held:
    """A place at which the next daemon that comes by stops until it is told how to go on."""

    def __init__(self, node: Node, name: str) -> None:
        self.name = name
        directory = node.path(FAILPOINTS)
        directory.mkdir(exist_ok=True)
        self._path = directory / name
        os.mkfifo(self._path)
        self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._answer = -1

    def reached(self, seconds: float = 30.0) -> int:
        """Waits for the daemon; its pid in the node."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        assert poll.poll(seconds * 1000), f"{self.name}: not reached within {seconds:.0f} s"
        pid = int(os.read(self._fd, 32))
        os.close(self._fd)
        self._fd = -1
        return pid

    def listens(self) -> None:
        """Waits, after `reached`, until it does no more than wait for `go_on`."""
        until("the daemon's listening", self._open_to_answer)

    def go_on(self, action: str = "go") -> None:
        """Lets it go on, after `reached`. The actions are shim/failpoint.py's."""
        self.listens()
        os.write(self._answer, action.encode())
        os.close(self._answer)

    def _open_to_answer(self) -> bool:
        if self._answer >= 0:
            return True
        try:
            self._answer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return False
        return True

    def remove(self) -> None:
        """For a daemon that will not come, or was killed while it was held."""
        if self._fd >= 0:
            os.close(self._fd)
        self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(node: Node, name: str) -> Iterator[Held]:
    place = Held(node, name)
    try:
        yield place
    finally:
        place.remove()


@contextlib.contextmanager
def told(node: Node, name: str, action: str) -> Iterator[None]:
    """The next daemon that comes by takes this action at once. It must come."""
    path = node.path(FAILPOINTS) / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(action)
    try:
        yield
        assert not path.exists(), f"{name}: not reached"
    finally:
        path.unlink(missing_ok=True)
