"""Takes from a forked process what it inherited of its parent's GPU. For the helper process only.

In place of each mapping comes empty memory, in place of each open device /dev/null, so that nothing
of the child's finds a hole: not even CUDA's own end, should it look at them.
"""

from __future__ import annotations

from shim.cuda.forked import Inheritance
from shim.cuda.inject import stopped

# x86-64 system call numbers
_MMAP, _MUNMAP, _CLOSE, _OPENAT, _DUP3 = 9, 11, 3, 257, 292
_PRIVATE_ANONYMOUS, _FIXED, _NORESERVE = 0x22, 0x10, 0x4000
_READ, _WRITE = 1, 2
_AT_FDCWD = -100
_O_RDWR, _O_CLOEXEC = 2, 0o2000000
_PAGE = 4096


def shed(pid: int, what: Inheritance) -> None:
    """Raises ptrace.TraceError or OSError, with the process going on; what was taken by then
    stays taken, and can be taken again."""
    with stopped(pid) as process:
        for start, end, allowed in what.mappings:
            protection = (_READ if "r" in allowed else 0) | (_WRITE if "w" in allowed else 0)
            flags = _PRIVATE_ANONYMOUS | _FIXED | _NORESERVE
            process.call(_MMAP, start, end - start, protection, flags, -1, 0)
        if not what.files:
            return
        page = process.call(_MMAP, 0, _PAGE, _READ | _WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        process.write(page, b"/dev/null\0")
        null = process.call(_OPENAT, _AT_FDCWD, page, _O_RDWR | _O_CLOEXEC)
        for number, closes in what.files:
            process.call(_DUP3, null, number, _O_CLOEXEC if closes else 0)
        process.call(_CLOSE, null)
        process.call(_MUNMAP, page, _PAGE)
