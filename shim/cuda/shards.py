"""The files that a process's memory is cut into, and how they are told of. Lean: in the shim and in
its helper."""

from __future__ import annotations

from shim.digests import BLOCK

_BLOCKS = 4
"""How many blocks a file holds at most, as long as there are not too many files."""
_MOST = 256
"""Files a range is cut into at most: their list has to fit into one message to the helper."""


class Shard:
    """One file: its `name`, the address its first byte had, the `size` of the memory in bytes, the
    file's `digest` in hex, as digests.take would have it, and the `codec` by which it is compressed
    (`packed` has the form), "" where it is the memory as it was. `seen` is a digest of the memory
    as it was written, by the fastest algorithm there is: for whoever has just written it to see
    whether it has changed since, and no part of a checkpoint."""

    __slots__ = ("codec", "digest", "name", "seen", "size", "start")

    def __init__(
        self,
        name: str,
        start: int,
        size: int,
        digest: str = "",
        codec: str = "",
        seen: str = "",
    ) -> None:
        self.name, self.start, self.size, self.digest = name, start, size, digest
        self.codec, self.seen = codec, seen

    def __repr__(self) -> str:
        return f"Shard({self.name!r}, {self.start:#x}, {self.size}, {self.digest!r})"

    def plain(self) -> list[str | int]:
        """What JSON can hold; `Shard(*plain)` is the shard again, but for `seen`. Of what is not
        compressed it is what it was before anything could be."""
        plain: list[str | int] = [self.name, self.start, self.size, self.digest]
        return [*plain, self.codec] if self.codec else plain

    def whole(self) -> list[str | int]:
        """The same, with `seen`."""
        return [self.name, self.start, self.size, self.digest, self.codec, self.seen]


def cut(start: int, end: int, prefix: str, threads: int, codec: str = "") -> list[Shard]:
    """[start, end) in whole blocks, the last one's rest aside, so that each thread has several."""
    blocks = -(-(end - start) // BLOCK)
    each = max(min(blocks // (2 * threads), _BLOCKS), -(-blocks // _MOST), 1) * BLOCK
    return [
        Shard(f"{prefix}{number}.img", at, min(each, end - at), codec=codec)
        for number, at in enumerate(range(start, end, each))
    ]
