"""Undo the network lock of a CRIU that was killed.

For the time of a dump CRIU drops every packet in the container's network namespace, by a chain
of its own in the filter table (criu/net.c: iptables_network_lock_internal). It takes the chain
away itself, whatever becomes of the dump, unless it dies: then the container (and with it every
other in its pod) would stay cut off. `unlock` must only ever remove that chain.
"""

from __future__ import annotations

_CHAIN = "CRIU"
_TIMEOUT_S = 10

_UNDO = (
    ("-D", "INPUT", "-j", _CHAIN),
    ("-D", "OUTPUT", "-j", _CHAIN),
    ("-F", _CHAIN),
    ("-X", _CHAIN),
)


def unlock(pid: int, env: dict[str, str] | None) -> bool | None:
    """Remove CRIU's chain from the network namespace of `pid`, for IPv4 and IPv6, with the
    iptables that `env` leads to. None: there was none; else whether it is gone."""
    namespace = f"/proc/{pid}/ns/net"
    found = [tool for tool in ("iptables", "ip6tables") if _locked(tool, namespace, env)]
    if not found:
        return None
    for tool in found:
        for rule in _UNDO:
            iptables(tool, namespace, env, *rule)
    return not any(_locked(tool, namespace, env) for tool in found)


def _locked(tool: str, namespace: str, env: dict[str, str] | None) -> bool:
    return iptables(tool, namespace, env, "-S", _CHAIN)


def iptables(tool: str, namespace: str, env: dict[str, str] | None, *rule: str) -> bool:
    """Runs `iptables` or `ip6tables` in the network namespace at that path; whether it could do
    what it was told."""
    import subprocess

    inside = ["nsenter", f"--net={namespace}", "--"]
    try:
        done = subprocess.run(
            [*inside, tool, "-w", *rule],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
