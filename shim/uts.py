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
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    for namespace in namespaces:
        if namespace["type"] == "uts":
            if namespace.get("path"):
                return _inside(str(namespace["path"]), _read)
            return {"hostname": str(spec["hostname"])} if spec.get("hostname") else {}
    return {}


def give(names: dict[str, str], pid: int) -> None:
    """Gives the namespace of process `pid` these names. Raises OSError."""

    def write() -> dict[str, str]:
        for name, value in names.items():
            if _read()[name] != value:
                with open(os.path.join(_FILES, name), "w", encoding="utf-8") as file:
                    file.write(value)
        return names

    if names:
        _inside(f"/proc/{pid}/ns/uts", write)


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
