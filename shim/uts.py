"""A pod's host name, kept through a restore: CRIU gives the namespace it joins the name that the
container had where it was dumped (CRIU 4.2: criu/uts_ns.c).

A thread joins the namespace, and only a thread of its own may: it never leaves it again.
"""

from __future__ import annotations

import os
import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NAMES = ("hostname", "domainname")
_FILES = "/proc/sys/kernel"
CLONE_NEWUTS = 0x04000000


def wanted(spec: dict[str, Any]) -> dict[str, str]:
    """The names that a container made from this specification has: those of the namespace that it
    joins, else the specification's own; none where it uses the node's. Raises OSError if the
    namespace is not to be entered."""
    joined = _joined(spec)
    if joined:
        return _inside(joined, _read)
    own = joined is not None and spec.get("hostname")
    return {"hostname": str(spec["hostname"])} if own else {}


def give(names: dict[str, str], spec: dict[str, Any], pid: int) -> None:
    """Gives these names to the namespace that the container joins, else to that of its process
    `pid`, if that has not ended. Raises OSError."""

    def write() -> dict[str, str]:
        for name, value in names.items():
            if _read()[name] != value:
                with open(os.path.join(_FILES, name), "w", encoding="utf-8") as file:
                    file.write(value)
        return names

    if names:
        try:
            _inside(_joined(spec) or f"/proc/{pid}/ns/uts", write)
        except FileNotFoundError:
            pass


def _joined(spec: dict[str, Any]) -> str | None:
    """The path of the namespace; "" for one of the container's own, None for the node's."""
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return next((str(ns.get("path") or "") for ns in namespaces if ns["type"] == "uts"), None)


def _read() -> dict[str, str]:
    found = {}
    for name in _NAMES:
        with open(os.path.join(_FILES, name), encoding="utf-8") as file:
            found[name] = file.read().rstrip("\n")
    return found


def _inside(path: str, work: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `work` returns in the namespace."""
    result: dict[str, str] = {}
    failures: list[Exception] = []

    def run() -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(fd)
            finally:
                os.close(fd)
            result.update(work())
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return result


def _setns(fd: int) -> None:
    """os.setns, which Python has since 3.12."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWUTS):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
