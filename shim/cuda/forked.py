"""Processes forked after CUDA came up, as PyTorch's data loaders fork theirs: they hold their
parent's GPU files and mappings, which are of no use to them (CUDA does not work in such a child),
and which CRIU cannot dump. Finds out, from /proc alone, what a process has of another's like that.

Nothing is taken for inherited that the process could have got by itself: by OpenGL or Vulkan, say.
Lean: runs in the shim.
"""

from __future__ import annotations

import os

from shim.cuda import discovery

_CUDA = "/libcuda.so"
_O_CLOEXEC = 0o2000000

Mapping = tuple[int, int, str]
"""Start, end, and what may be done with it ("rw-s"), as in /proc/PID/maps."""


class Inheritance:
    """What a child has of its parent's GPU: mappings, and files as (number, close-on-exec)."""

    __slots__ = ("files", "mappings")

    def __init__(self, mappings: list[Mapping], files: list[tuple[int, bool]]) -> None:
        self.mappings = mappings
        self.files = files

    def __bool__(self) -> bool:
        return bool(self.mappings or self.files)

    def encode(self) -> str:
        """One word: `start,end,rw-s;...|number,0;...`"""
        mappings = ";".join(f"{start:x},{end:x},{allowed}" for start, end, allowed in self.mappings)
        return mappings + "|" + ";".join(f"{number},{closes:d}" for number, closes in self.files)

    @classmethod
    def decode(cls, text: str) -> Inheritance:
        """Raises ValueError where `text` is not what `encode` makes."""
        mappings, _, files = text.partition("|")
        return cls(
            [
                (int(start, 16), int(end, 16), allowed)
                for start, end, allowed in (m.split(",") for m in mappings.split(";") if m)
            ],
            [
                (int(number), closes == "1")
                for number, closes in (f.split(",") for f in files.split(";") if f)
            ],
        )


def inherited(child: int, parent: int) -> Inheritance:
    """What `child` has of the GPU that `parent` has in the very same place; false if nothing.

    Only where it was forked from it and has run no other program since: then, and only then, both
    have libcuda at the same address. Raises OSError where either is gone."""
    theirs, ours = _maps(child), _maps(parent)
    if not any(_CUDA in line and line in ours for line in theirs):
        return Inheritance([], [])
    shared = [line for line in theirs if line in ours and _is_device(line.split(None, 5)[-1])]
    known = _files(parent)
    files = [
        (number, closes)
        for number, (path, closes) in _files(child).items()
        if number in known and known[number][0] == path
    ]
    return Inheritance([_mapping(line) for line in shared], files)


def _maps(pid: int) -> set[str]:
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        return {line.rstrip("\n") for line in file}


def _mapping(line: str) -> Mapping:
    span, allowed, _ = line.split(None, 2)
    start, _, end = span.partition("-")
    return int(start, 16), int(end, 16), allowed


def _is_device(path: str) -> bool:
    return path.startswith(discovery.DEVICE_PREFIX)


def _files(pid: int) -> dict[int, tuple[str, bool]]:
    """The NVIDIA devices that a process has open: number -> (path, close-on-exec)."""
    found = {}
    directory = f"/proc/{pid}/fd"
    for name in os.listdir(directory):
        try:
            path = os.readlink(f"{directory}/{name}")
            if _is_device(path):
                with open(f"/proc/{pid}/fdinfo/{name}", encoding="ascii") as file:
                    flags = next(line.split()[1] for line in file if line.startswith("flags:"))
                found[int(name)] = path, bool(int(flags, 8) & _O_CLOEXEC)
        except OSError:
            continue  # closed meanwhile
    return found
