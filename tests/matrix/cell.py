"""One cell of the matrix: a container whose checkpoint, or whose restore, meets a fault in a phase.
What must hold afterwards is here, once for all faults.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import TYPE_CHECKING

from shim import checkpoint_dir
from shim.gritctl import messages as m
from shim.gritctl.containerd import ContainerdError
from tests.e2e import failpoints
from tests.e2e.faults import helpers
from tests.e2e.gpu import until
from tests.simgpu import simgpu
from tests.soak.box import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu
    from tests.soak.box import Box

PLACE = "/var/tmp/matrix"
IMAGES = f"{PLACE}/checkpoint"
BYTES = 256 << 10


class Cell:
    """A running container with a GPU, and what is done to it."""

    def __init__(
        self, node: Node, board: SimGpu, box: Box, record: Callable[[str, object], None]
    ) -> None:
        self.node = node
        self.board = board
        self.box = box
        self.daemon = box.shims()["outer"]
        self.kind = ""
        """Of checkpoint, for the table."""
        self._record = record
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        node.path(PLACE).mkdir()

    def came(self, fault: str, operation: str, phase: str, what: str) -> None:
        """For the table."""
        self._record("matrix", (fault + self.kind, operation, phase, what))

    def held(self, phase: str) -> failpoints.Held:
        return failpoints.Held(self.node, phase)

    # --- what is under way ----------------------------------------------------------------

    def checkpoint(self, images: str = IMAGES) -> concurrent.futures.Future[str]:
        """A checkpoint under way: "" or what its client is told."""
        return self._pool.submit(self._told, lambda: self.box.begin_checkpoint(images).result())

    def end_by_checkpoint(self, images: str = IMAGES) -> None:
        """A good one with --exit; the container is then ready to be restored from it."""
        ended = self.box.begin_wait()
        self.box.begin_checkpoint(images, end=True).result()
        ended.result()
        self.saved = self.box.last()
        self.box.restore_from(images)

    def restore(self) -> concurrent.futures.Future[str]:
        """A restore under way, after `end_by_checkpoint`."""
        return self._pool.submit(self._told, self.box.run)

    def restart(self) -> None:
        """Under what grit.toml says now."""
        self.box.end()
        self.box.start()
        self.box.check()
        self.daemon = self.box.shims()["outer"]

    def reconnect(self) -> None:
        """To a containerd that was started anew."""
        self.box.containerd.__exit__()
        self.box.containerd = connect(self.node)
        # gRPC may remember for a while that nobody listened on that socket.
        until("containerd", self._answers)

    def _answers(self) -> bool:
        try:
            self.box.status()
        except ContainerdError:
            return False
        return True

    @staticmethod
    def _told(act: Callable[[], object]) -> str:
        try:
            act()
        except ContainerdError as error:
            return str(error) or "an error without a word"
        return ""

    # --- what must hold -------------------------------------------------------------------

    def alive(self, *, whole: bool, images: str = IMAGES) -> str:
        """The workload runs, with all that it had; there is a checkpoint that verifies, or none;
        nothing is left of the attempt, and the next one works. What it is called in the table."""
        until("RUNNING", lambda: self.box.status() == m.RUNNING)
        self.box.check()
        self._clean()
        self._only(images, whole)
        self.next_works()
        return "whole, runs on" if whole else "runs on"

    def dead(self, told: str, *, whole: bool = False) -> str:
        """Nothing runs, the client was told why, and the container can be started anew."""
        assert told, "the client was told that all went well"
        until("the end of all processes", lambda: not self._workloads())
        assert self.board.owners() == {}
        until("the end of helpers and CRIU", lambda: not self._busy())
        self._none_half(IMAGES, whole)
        self.box.remove()
        until("removal", lambda: not self.box.status())
        self.box.start()
        self.box.check()
        if not whole:  # what a daemon that was killed has begun is in nobody's way
            self.box.begin_checkpoint(IMAGES).result()
            self._only(IMAGES, True)
        self.next_works()
        return "dead, told" + (", whole" if whole else "")

    def restorable(self, told: str, images: str = IMAGES) -> str:
        """The restore failed, nothing of it runs, and another one works."""
        assert told, "the client was told that all went well"
        until("the end of all processes", lambda: not self._workloads())
        assert self.board.owners() == {}
        until("the end of helpers and CRIU", lambda: not self._busy())
        self._only(images, True)
        self.box.back_to(self.saved)
        # A task whose shim was killed is gone, or about to.
        self._told(self.box.delete_task)
        until("removal", lambda: not self.box.status())
        self.box.run()
        self.box.check()
        self.next_works()
        return "not restored, told; again: restored"

    def restored(self) -> str:
        """It was, and goes on."""
        until("RUNNING", lambda: self.box.status() == m.RUNNING)
        self.box.check()
        self.next_works()
        return "restored all the same"

    def next_works(self) -> None:
        """And leaves the daemon with no more descriptors and threads than the one before it."""
        images = f"{PLACE}/next/checkpoint"
        held = []
        for _ in range(2):
            self.node.path(images).parent.mkdir(exist_ok=True)
            self.box.begin_checkpoint(images).result()
            self._only(images, True)
            self.node.run(["rm", "-r", f"{PLACE}/next"])
            self.box.check()
            held.append(self._held_by_daemon())
        until("descriptors, threads", lambda: _no_more(self._held_by_daemon(), held[0]))
        self._clean()

    def _clean(self) -> None:
        init = self.box.pid()
        assert self.board.library.state(init) == (simgpu.SUCCESS, simgpu.RUNNING)
        assert self.board.owners() == {init: BYTES}
        until("the end of helpers and CRIU", lambda: not self._busy())

    def _busy(self) -> list[int]:
        named = self.node.pids("criu") + self.node.pids("cuda-checkpoint")
        return helpers(self.node) + named

    def _workloads(self) -> list[int]:
        return [pid for pid, words in self.node.processes().items() if simgpu.WORKLOAD in words]

    def _only(self, images: str, whole: bool) -> None:
        self._none_half(images, whole)
        place = self.node.path(images)
        beside = {one.name for one in place.parent.iterdir()} - {place.name, "next"}
        assert not beside, "left beside the checkpoint"

    def _none_half(self, images: str, whole: bool) -> None:
        """What has the final name verifies, or nothing has it."""
        place = self.node.path(images)
        if whole:
            assert not checkpoint_dir.verify(str(place), checkpoint_dir.load(str(place)))
        else:
            assert not place.exists() or not list(place.iterdir()), "half a checkpoint"

    def _held_by_daemon(self) -> tuple[int, int]:
        process = self.node.path(f"/proc/{self.box.shims()['outer']}")
        return len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def _no_more(now: tuple[int, int], before: tuple[int, int]) -> bool:
    return now[0] <= before[0] and now[1] <= before[1]
