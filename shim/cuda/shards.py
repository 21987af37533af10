"""The files that a process's memory is cut into, and how they are told of. Lean: in the shim and in
its helper."""

from __future__ import annotations

from shim.digests import BLOCK

_BLOCKS = 4
"""How many blocks a file holds at most, as long as there are not too many files."""
_MOST = 256
"""Files a range is cut into at most: their list has to fit into one message to the helper."""


class Shard:
    """One file: its `name`, the address its first byte had, its `size` in bytes, and its `digest`
    in hex, as digests.take would have it. `seen` is a digest of the memory as it was written, by
    the fastest algorithm there is: for whoever has just written it to see whether it has changed
    since, and no part of a checkpoint."""

    __slots__ = ("digest", "name", "seen", "size", "start")

    def __init__(self, name: str, start: int, size: int, digest: str = "", seen: str = "") -> None:
        self.name, self.start, self.size, self.digest = name, start, size, digest
        self.seen = seen

    def __repr__(self) -> str:
        return f"Shard({self.name!r}, {self.start:#x}, {self.size}, {self.digest!r})"

    def plain(self) -> list[str | int]:
        """What JSON can hold; `Shard(*plain)` is the shard again, but for `seen`."""
        return [self.name, self.start, self.size, self.digest]

    def whole(self) -> list[str | int]:
        """The same, with `seen`."""
        return [*self.plain(), self.seen]


def cut(start: int, end: int, prefix: str, threads: int) -> list[Shard]:
    """[start, end) in whole blocks, the last one's rest aside, so that each thread has several."""
    blocks = -(-(end - start) // BLOCK)
    each = max(min(blocks // (2 * threads), _BLOCKS), -(-blocks // _MOST), 1) * BLOCK
    return [
        Shard(f"{prefix}{number}.img", at, min(each, end - at))
        for number, at in enumerate(range(start, end, each))
    ]
