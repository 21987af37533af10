"""What is done to a container in a round. Each ends with the container running, or raises; what is
broken on purpose may be told to have failed, but the container has to be there all the same.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import TYPE_CHECKING

from shim.gritctl import messages as m
from shim.gritctl.containerd import ContainerdError
from tests.e2e.faults import HELPER
from tests.soak.box import Box, Wrong, clear

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.gritctl.containerd import Call

    Act = Callable[[Box, random.Random], str]

PLACE = "/var/tmp/soak"
_LIVES = {"criu": 0.06, HELPER: 0.01}
"""Seconds after a victim's appearance within which it is killed: about as long as it is busy."""


def checkpoint(box: Box, chance: random.Random) -> str:
    """And go on; at random with the client's own Pause and Resume around it, as ctr does it."""
    images = _images(box)
    paused = chance.random() < 0.5
    if paused:
        box.begin("Pause").result()
    box.begin_checkpoint(images).result()
    if paused:
        box.begin("Resume").result()
    _must_have(box, images, True)
    return "paused by the client" if paused else ""


def restore(box: Box, _: random.Random) -> str:
    """Checkpointed with --exit and restored."""
    images = _images(box)
    _save_and_end(box, images)
    box.restore_from(images)
    box.run()
    return ""


def pause(box: Box, chance: random.Random) -> str:
    box.begin("Pause").result()
    if box.status() != m.PAUSED:
        raise Wrong(f"{box.name} is not paused after its Pause")
    time.sleep(chance.random() * 0.05)
    box.begin("Resume").result()
    return ""


def anew(box: Box, _: random.Random) -> str:
    """Killed, removed, and started from its image."""
    box.end()
    box.start()
    return ""


def break_dump(victim: str) -> Act:
    """A checkpoint whose CRIU or helper is killed at a random moment."""

    def act(box: Box, chance: random.Random) -> str:
        images = _images(box)
        call = box.begin_checkpoint(images)
        struck = _strike(box, victim, call, chance)
        try:
            call.result()
            failed = False
        except ContainerdError as error:
            failed = True
            if not struck:
                raise
            _must_tell(error)
            if "the container has ended" in str(error):
                _must_have(box, images, False)
                box.remove()
                box.start()
                return "killed, and the workload with it, told"
        _must_have(box, images, not failed)
        if box.status() == m.PAUSED:
            raise Wrong(f"{box.name} was left paused by a checkpoint that nobody paused it for")
        return _outcome(struck, failed)

    return act


def break_restore(victim: str) -> Act:
    """A restore whose CRIU or helper is killed at a random moment, and another one."""

    def act(box: Box, chance: random.Random) -> str:
        images = _images(box)
        _save_and_end(box, images)
        saved = box.last()
        box.restore_from(images)
        call = box.begin_run()
        struck = _strike(box, victim, call, chance)
        try:
            call.result()
            failed = False
        except ContainerdError as error:
            failed = True
            if not struck:
                raise
            _must_tell(error)
            box.back_to(saved)
            box.delete_task()
            box.run()
        return _outcome(struck, failed)

    return act


ACTS: dict[str, tuple[int, Act]] = {
    "checkpoint": (6, checkpoint),
    "checkpoint --exit, restore": (6, restore),
    "pause, resume": (3, pause),
    "kill, start anew": (2, anew),
    "checkpoint, CRIU killed": (2, break_dump("criu")),
    "checkpoint, helper killed": (2, break_dump(HELPER)),
    "restore, CRIU killed": (1, break_restore("criu")),
    "restore, helper killed": (1, break_restore(HELPER)),
}
"""By name: how often, and what."""

KEEPING_THE_SHIM = ("checkpoint", "pause, resume", "checkpoint, helper killed")


def _save_and_end(box: Box, images: str) -> None:
    ended = box.begin_wait()
    box.begin_checkpoint(images, end=True).result()
    ended.result()
    _must_have(box, images, True)


def _images(box: Box) -> str:
    """A checkpoint's place, empty, in GRIT's layout."""
    clear(box.node, f"{PLACE}/{box.name}")
    box.node.path(f"{PLACE}/{box.name}").mkdir(parents=True)
    return f"{PLACE}/{box.name}/checkpoint"


def _must_have(box: Box, images: str, whole: bool) -> None:
    """A checkpoint or nothing at all."""
    place = box.node.path(images)
    if place.joinpath("grit.json").exists() != whole:
        raise Wrong(f"{box.name}: a checkpoint that {'went well' if whole else 'failed'}: {place}")
    left = [one.name for one in place.parent.iterdir() if one != place]
    if left or (not whole and place.exists() and list(place.iterdir())):
        raise Wrong(f"{box.name}: left beside or in the checkpoint's place: {left or place}")


def _must_tell(error: ContainerdError) -> None:
    if not any(
        word in str(error)
        for word in ("killed", "signal", "crashed", "criu", "exit status -9", "readlink /proc/")
    ):
        raise Wrong(f"a call whose helper or CRIU was killed is told: {error}")


def _outcome(struck: bool, failed: bool) -> str:
    if not struck:
        return "nothing to kill"
    return "killed, failed" if failed else "killed, went well all the same"


def _strike(box: Box, victim: str, call: Call[m.Nothing], chance: random.Random) -> bool:
    """Kills the victim that works for this call; False if the call was over before."""
    shims = set(box.shims().values())
    delay = chance.random() * _LIVES[victim]
    while not call.wait(0.001):
        if pid := _working(box, victim, shims):
            if call.wait(delay):
                return False
            try:
                os.kill(box.node.host_pid(pid), signal.SIGKILL)
            except ProcessLookupError:
                continue
            return True
    return False


def _working(box: Box, victim: str, shims: set[int]) -> int:
    """The pid in the node of a victim that descends from one of these shims; 0 for none."""
    for pid, words in box.node.processes().items():
        called = words[0].startswith("criu: ") or os.path.basename(words[0]) == "criu"
        if called if victim == "criu" else any(victim in word for word in words):
            above = pid
            while above > 1:
                above = _parent(box, above)
                if above in shims:
                    return pid
    return 0


def _parent(box: Box, pid: int) -> int:
    try:
        with open(box.node.path(f"/proc/{pid}/stat")) as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0
