"""The cache of what is dear to make: root file systems, install layers, plugins, images.

It lies outside the source tree. An entry appears under its final name only when it is
whole, and two test runs never make the same entry twice: the second waits for the first.
Nothing here knows what an entry holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def directory() -> Path:
    """`$GRIT_CACHE`, else /var/cache/grit-tests."""
    return Path(os.environ.get("GRIT_CACHE") or "/var/cache/grit-tests")


def digest(*parts: object) -> str:
    """Twelve hex digits that change when any part's text does."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the exclusive lock of `path` (a file beside it), waiting for it if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def entry(path: Path, make: Callable[[Path], None]) -> Path:
    """Returns `path`, first letting `make` fill a directory that is then renamed to it.

    `make` gets an empty directory beside `path`; what a run that died left there is removed
    first. If `make` raises, nothing appears under `path`.
    """
    if path.exists():
        return path
    with locked(path):
        if path.exists():
            return path
        draft = path.with_name(f".{path.name}.draft")
        if draft.exists():
            shutil.rmtree(draft)
        draft.mkdir()
        say(f"making {path}")
        started = time.monotonic()
        make(draft)
        draft.rename(path)
        say(f"made {path.name} in {time.monotonic() - started:.0f} s")
    return path


def say(text: str) -> None:
    """A line for whoever waits."""
    print(f"[nodes] {text}", file=sys.stderr, flush=True)
