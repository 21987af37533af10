"""TCP connections between two containers of a pod, through its loopback, where they are kept.

Containers are restored one after the other. When the first has its end of a connection again,
there is nothing at the other yet, and the kernel would answer whatever it sends with a reset. So
resets to that end, and nothing else, are dropped in the pod's network namespace until the other
end is there, or `together_timeout` has passed. What was sent meanwhile TCP sends again.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager

from shim import bundle, cri, log
from shim.criu_bridge import contents, network
from shim.criu_bridge.images import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from shim.container import Container
    from shim.criu_bridge.contents import Connection


class Ends:
    """The ends in one pod that wait for theirs: restored, and the other end is not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[Connection, threading.Timer] = {}

    @contextmanager
    def restoring(self, container: Container, images: str) -> Iterator[None]:
        """While the container is restored from `images`, with its connections kept: those to
        others are shielded from resets before, and those that others wait for no more after."""
        spec = bundle.read_spec(container.bundle)
        namespace = _network_of(spec)
        ends = _to_others(container, images) if namespace else set()
        with self._lock:
            first = {end for end in ends if _reverse(end) not in self._waiting}
        for end in first:
            _shield(namespace, end, "-I")
        try:
            yield
        except BaseException:
            for end in first:
                _shield(namespace, end, "-D")
            raise
        seconds = container.config.together_timeout
        for end in ends:
            if end in first:
                timer = threading.Timer(seconds, self._give_up, (namespace, end, container.id))
                timer.daemon = True
                with self._lock:
                    self._waiting[end] = timer
                timer.start()
            else:
                self._end(namespace, _reverse(end))

    def _give_up(self, namespace: str, end: Connection, container_id: str) -> None:
        if self._end(namespace, end):
            log.warning(
                "a container of the pod that had a connection to this one was not restored in "
                "time: the connection is reset when it is used next",
                id=container_id,
                connection=f"{end[1]}:{end[2]} to {end[3]}:{end[4]}",
            )

    def _end(self, namespace: str, end: Connection) -> bool:
        with self._lock:
            timer = self._waiting.pop(end, None)
        if timer is None:
            return False
        timer.cancel()
        _shield(namespace, end, "-D")
        return True


def _network_of(spec: dict[str, Any]) -> str:
    """The path of the pod's network namespace, "" for a container that is in no pod."""
    if not cri.sandbox_id(bundle.annotations_of(spec)):
        return ""
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return next((str(one.get("path", "")) for one in namespaces if one["type"] == "network"), "")


def _to_others(container: Container, images: str) -> set[Connection]:
    try:
        found = contents.loopback_connections(images)
    except ImageError as error:
        log.warning("connections are not shielded from resets", id=container.id, error=error)
        return set()
    return {end for end in found if _reverse(end) not in found}


def _reverse(end: Connection) -> Connection:
    family, address, port, peer, peer_port = end
    return family, peer, peer_port, address, port


def _shield(namespace: str, end: Connection, action: str) -> None:
    """Inserts (-I) or deletes (-D) the rule that drops what resets this end."""
    family, address, port, peer, peer_port = end
    tool = "ip6tables" if family == "ipv6" else "iptables"
    rule = ["-o", "lo", "-p", "tcp", "-s", peer, "-d", address, "--sport", str(peer_port)]
    rule += ["--dport", str(port), "--tcp-flags", "RST", "RST", "-j", "DROP"]
    if not network.iptables(tool, namespace, None, action, "OUTPUT", *rule):
        log.warning(
            "a connection could not be shielded from resets, or is shielded still",
            tool=tool,
            action=action,
            connection=f"{address}:{port} to {peer}:{peer_port}",
        )
