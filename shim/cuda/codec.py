"""LZ4 and Zstandard, by the libraries that every Debian has for its apt. For the helper process
only. Neither holds the interpreter's lock, and neither writes beyond the room it is told of,
whatever it is given to decompress.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from shim.cuda._codec import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Call = Callable[[int, int, int, int], int]
    """Takes the source's address and size and the target's, in bytes; how much of the target was
    filled, or 0 where it could not be done: what is compressed does not fit, or what is to be
    decompressed is damaged."""

LZ4, ZSTD = "lz4", "zstd"
LIBRARIES = {LZ4: ("liblz4.so.1", "liblz4-1"), ZSTD: ("libzstd.so.1", "libzstd1")}
"""By codec: the library, and Debian's package of it."""

_LEVEL = 1
"""Of Zstandard. The lowest that codes single bytes by how often they come, which is all there is to
gain of weights: the negative ones do not, and higher ones gained nothing (docs/performance.md)."""


class Unavailable(Exception):
    """The library is not there, or there is no such codec; says what to do."""


def why_not(name: str) -> str:
    """Why this codec cannot be used here; "" if it can."""
    try:
        _library(name)
    except Unavailable as error:
        return str(error)
    return ""


def missing(names: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Those of these codecs that cannot be used here, and why not."""
    return {name: reason for name in names if (reason := why_not(name))}


def compressor(name: str) -> Call:
    """For one thread. Raises Unavailable."""
    library = _library(name)
    if name == LZ4:
        return _by_lz4(library.LZ4_compress_default)
    context = _context(library.ZSTD_createCCtx, library.ZSTD_freeCCtx)
    return _by_zstd(library, library.ZSTD_compressCCtx, context, _LEVEL)


def decompressor(name: str) -> Call:
    """For one thread. Raises Unavailable."""
    library = _library(name)
    if name == LZ4:
        return _by_lz4(library.LZ4_decompress_safe)
    context = _context(library.ZSTD_createDCtx, library.ZSTD_freeDCtx)
    return _by_zstd(library, library.ZSTD_decompressDCtx, context)


def _by_lz4(function: Any) -> Call:
    def call(source: int, size: int, target: int, room: int) -> int:
        made: int = function(ffi.cast("char *", source), ffi.cast("char *", target), size, room)
        return max(made, 0)

    return call


def _by_zstd(library: Any, function: Any, context: Any, *level: int) -> Call:
    def call(source: int, size: int, target: int, room: int) -> int:
        made: int = function(
            context, ffi.cast("void *", target), room, ffi.cast("void *", source), size, *level
        )
        return 0 if library.ZSTD_isError(made) else made

    return call


def _context(make: Any, free: Any) -> Any:
    made = make()
    if not made:
        raise MemoryError("there is no memory for Zstandard's tables")
    return ffi.gc(made, free)


def _library(name: str) -> Any:
    if name not in LIBRARIES:
        raise Unavailable(f"this grit knows no compression {name!r}")
    file, package = LIBRARIES[name]
    try:
        return _opened(file)
    except OSError as error:
        raise Unavailable(f"{error} (Debian and Ubuntu: apt-get install {package})") from None


@cache
def _opened(file: str) -> Any:
    """For good: contexts that nobody needs any more are freed by it, whenever that is."""
    return ffi.dlopen(file)
