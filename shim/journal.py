"""What is being done to a container, on disk, for whoever finds its daemon dead: `ending` undoes
by it what would outlive the container, and says what the container was lost in the middle of.

One JSON file per container in the group's run directory: `phase` is what began last, the other
fields are facts that hold since they were noted. Written before each step; gone when the container
runs again or has ended. Not synced: it lies on a tmpfs, and what it speaks of ends with the
machine.

    phase         BEGUN ... below
    processes     [[pid, start time], ...] of those with CUDA, as far as they are known
    engine        of the suspension
    criu          [pid, start time] of the CRIU that dumps it, if it is ours
    draft         the directory that is to become the checkpoint; CRIU dumps into it, or into
    plain         if that is encrypted: there images lie in the clear, those of a restore, too
    final         what is to become of it
    checkpoint    the same, once it is a whole checkpoint
    images        what it is being restored from
"""

from __future__ import annotations

import os

from shim import bundle, lean_json, log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.container import Container

BEGUN = "beginning a checkpoint"
LOCKING = "locking"
COPYING = "copying"
SUSPENDED = "suspended"
FREEZING = "freezing"
PAUSED = "paused"
DROPPING = "dropping device memory that is in files"
DUMPING = "dumping"
REFILLING = "filling device memory in again"
PUBLISHING = "publishing"
PUBLISHED = "published"
THAWING = "thawing"
GIVING_BACK = "giving the GPU back"
DECRYPTING = "decrypting"
DECRYPTED = "decrypted"
RESTORING = "restoring"
RESTORING_GPU = "restoring the GPU"


def note(container: Container, phase: str, **facts: object) -> None:
    """To be called before the phase begins. Never raises an error: a checkpoint, and the undoing
    of one above all, must not fail over its journal."""
    container.journal |= facts
    container.journal["phase"] = phase
    if not container.home:
        return
    path = _path(container.home, container.id)
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        bundle.replace(path, lean_json.dumps(container.journal), mode=0o600)
    except OSError as error:
        log.warning("the journal could not be written", id=container.id, phase=phase, error=error)


def close(container: Container) -> None:
    """Nothing is being done to the container any more."""
    container.journal.clear()
    try:
        os.unlink(_path(container.home, container.id))
    except OSError:
        pass  # nothing was noted


def read(group: str) -> dict[str, dict[str, Any]]:
    """The journals in a group's run directory, by container id. One that cannot be read is passed
    over: nobody is left who could do better."""
    found = {}
    directory = os.path.join(group, "journal")
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return {}
    for name in names:
        try:
            with open(os.path.join(directory, name), encoding="utf-8") as file:
                entry = lean_json.loads(file.read())
        except (OSError, ValueError):
            continue
        if isinstance(entry, dict) and isinstance(entry.get("phase"), str):
            found[name] = entry
    return found


def _path(group: str, container_id: str) -> str:
    return os.path.join(group, "journal", container_id)
