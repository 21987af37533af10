"""What the proxy adds to a call: `python -m tests.bench.ttrpc_proxy_latency [calls]`.

Client, proxy and echo server are a process each, as containerd, our daemon and the inner shim are.
Calls alternate between the direct and the proxied way, so that whatever else the machine does falls
on both. Prints medians and 99th percentiles in microseconds, and the proxy's memory.
"""

from __future__ import annotations

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from shim.ttrpc.frames import FrameReader
from shim.ttrpc.messages import KeyValue, Request

ROOT = Path(__file__).resolve().parents[2]
SERVICE = "containerd.task.v3.Task"

# Both peers are bare loops, so that the difference is the proxy alone.
SERVER = """
    import socket, sys, threading
    from shim.ttrpc.connection import ServerConnection
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    def serve(sock):
        core = ServerConnection()
        while data := sock.recv(65536):
            for event in core.receive(data):
                sock.sendall(core.respond(event.stream_id, event.payload))
    print("ready", flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
PROXY = """
    import socket, sys
    from shim.ttrpc.proxy import Proxy
    from shim.ttrpc.sockets import connect
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[2])
    listener.listen()
    answered = {"Pause": lambda call: call.payload}
    proxy = Proxy(listener, lambda: connect(sys.argv[1]), lambda _, method: answered.get(method))
    print("ready", flush=True)
    proxy.run()
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", textwrap.dedent(program), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


class Caller:
    """Makes one call after the other on a connection, and keeps how long each took."""

    def __init__(self, address: str, method: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(address)
        self._data = Request(
            service=SERVICE,
            method=method,
            payload=b"\x0a\x40" + b"0" * 64,
            timeout_nano=10**10,
            metadata=[KeyValue(key="containerd-namespace-ttrpc", value="k8s.io")],
        ).encode()
        self._next_id = 1
        self.microseconds: list[float] = []

    def call(self) -> None:
        raw = len(self._data).to_bytes(4, "big") + self._next_id.to_bytes(4, "big") + b"\1\0"
        self._next_id += 2
        reader = FrameReader()
        begun = time.perf_counter()
        self._sock.sendall(raw + self._data)
        while not reader.feed(self._sock.recv(1 << 16)):
            pass
        self.microseconds.append((time.perf_counter() - begun) * 1e6)


def proportional_set(pid: int) -> float:
    """Mebibytes of memory that the process is charged with, shared pages by their share."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise LookupError(f"no Pss for pid {pid}")


def measure(calls: int, report: Callable[[str], None]) -> None:
    """Runs the comparison and reports it line by line."""
    with tempfile.TemporaryDirectory(prefix="ttrpc.") as directory:
        inner, outer = os.path.join(directory, "inner"), os.path.join(directory, "outer")
        path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        server = start(path + textwrap.dedent(SERVER), inner)
        proxy = start(path + textwrap.dedent(PROXY), inner, outer)
        try:
            callers = {
                "direct": Caller(inner, "State"),
                "passed through": Caller(outer, "State"),
                "answered by a handler": Caller(outer, "Pause"),
            }
            for _ in range(calls):
                for caller in callers.values():
                    caller.call()
            base = statistics.median(callers["direct"].microseconds)
            for name, caller in callers.items():
                times = caller.microseconds
                median, worst = statistics.median(times), statistics.quantiles(times, n=100)[98]
                added = f"   adds {median - base:6.1f}" if name != "direct" else ""
                report(f"{name:22}  p50 {median:7.1f} us  p99 {worst:7.1f} us{added}")
            report(f"proxy's memory (PSS)    {proportional_set(proxy.pid):.1f} MiB")
        finally:
            for child in (proxy, server):
                child.kill()
                child.wait()


if __name__ == "__main__":
    measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5000, print)
