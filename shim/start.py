"""`start`: called by containerd in a new bundle, answers with the address of the shim that
will serve it.

Containers of one pod share a shim: the first `start` brings up the stock shim underneath
and our daemon in front of it, every further one finds the daemon listening and repeats the
answer. Nothing but the answer may reach standard output or standard error, and the daemon
must not keep them open: containerd reads both to their end (2.1 core/runtime/v2/binary.go).
"""

from __future__ import annotations

import _socket
import os
import sys

from shim import bundle, group, inner, places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from shim.invocation import Invocation

_BACKLOG = 128
_END_SECONDS = 3.0


def run(call: Invocation) -> NoReturn:
    """Prints the answer and ends; the daemon, if one is needed, has been forked off.

    Raises OSError, ValueError or InnerError with nothing left running.
    """
    here = os.getcwd()
    spec = bundle.read_spec(here)
    grouping = bundle.grouping(spec, call.get("id"))
    address = _address(call.get("address"), call.get("namespace"), grouping)
    home = places.group_directory(address)

    os.makedirs(places.SOCKETS, mode=0o700, exist_ok=True)
    lock = group.lock(home)  # two containers of a pod may start together
    listener = _listen(places.socket_of(address))
    if listener is None and group.is_over(home):
        lock = _outlast(home, lock)
        listener = _listen(places.socket_of(address))
    if listener is None:
        answer = _answer(group.answer(home), address)
        os.close(lock)
        _reply(here, answer)

    try:
        group.prepare(home, grouping, os.path.join(here, "log"))
        binary = inner.find(call.get("publish-binary"))
        began, answering = inner.begin_start(binary, call.argv, home, _inner_options())
        # It loads its code while the stock shim starts on another processor.
        told, tell = os.pipe()
        daemon = os.fork()
        if daemon == 0:
            for fd in (lock, answering, tell):
                os.close(fd)
            _daemon(listener.detach(), home, call.get("namespace"), told)
        inner_answer = inner.answer(began, answering)
        group.record_answer(home, inner_answer)
        group.record_sockets(home, _inner_sockets(call, grouping, inner_answer))
        group.record_process(home, "outer", daemon)
    except BaseException:
        os.unlink(places.socket_of(address))
        group.remove(home)
        raise  # and the daemon, told nothing, ends
    os.write(tell, bundle.address_in(inner_answer).encode())
    os.close(lock)
    _reply(here, _answer(inner_answer, address))


def _outlast(home: str, lock: int) -> int:
    """Waits for the end of a daemon whose last task is gone, which needs the lock for it; the lock,
    taken again. One that does not end was not asked to, and goes on."""
    import select

    pid = group.living_process(home, "outer")
    os.close(lock)
    try:
        process = os.pidfd_open(pid) if pid else -1
    except ProcessLookupError:
        process = -1
    if process >= 0:
        select.select([process], [], [], _END_SECONDS)
        os.close(process)
    return group.lock(home)


def _address(containerd: str, namespace: str, grouping: str) -> str:
    """Our address: in the directory of all shims' sockets, under a name of our own (the
    stock formula would give the inner's name when grouping and id agree)."""
    return "unix://" + places.hashed_socket(containerd, namespace, "grit", grouping)


def _inner_options() -> bytes:
    given = inner.read_options()
    if not given:
        return b""
    from shim import options

    return options.for_inner(given)


def _inner_sockets(call: Invocation, grouping: str, answer: str) -> list[str]:
    inner_grouping = group.inner_grouping(grouping)
    debug = places.debug_socket(call.get("address"), call.get("namespace"), inner_grouping)
    return [places.socket_of(bundle.address_in(answer)), debug]


def _listen(path: str) -> _socket.socket | None:
    """A listening socket at `path`, or None if a living daemon listens there already.
    A socket that a dead daemon left behind is replaced."""
    listener = _socket.socket(_socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        try:
            listener.bind(path)
        except OSError:
            probe = _socket.socket(_socket.AF_UNIX)
            probe.settimeout(0.1)
            served = probe.connect_ex(path) == 0
            probe.close()
            if served:
                listener.close()
                return None
            os.unlink(path)
            listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    return listener


def _answer(inner_answer: str, address: str) -> str:
    """The inner's answer with our address in it: its form tells containerd which version of
    the task service the shim speaks, and that is the inner's to say (facts 1.2)."""
    return inner_answer.replace(bundle.address_in(inner_answer), address)


def _reply(here: str, answer: str) -> NoReturn:
    bundle.write_address(here, answer)
    sys.stdout.write(answer)
    sys.stdout.flush()
    # containerd waits for the end, and an interpreter taken down piece by piece takes 2 ms.
    os._exit(0)


def _daemon(listener: int, home: str, namespace: str, told: int) -> NoReturn:
    """What the forked child becomes, once it can read from `told` where the stock shim listens."""
    status = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        from shim import serve

        with open(told, encoding="utf-8") as pipe:
            inner_address = pipe.read()
        if inner_address:
            status = serve.run(listener, home, namespace, inner_address)
    finally:
        os._exit(status)
