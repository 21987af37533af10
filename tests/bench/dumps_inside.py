"""The part of the bench that checkpoints and restores on the node, with the installed shim's
interpreter. Reads an order as JSON from standard input, says on standard error what it is doing,
and prints one JSON object: by side, a list of rounds with their seconds.

A side is `runc` itself, the stock shim, or grit; both shims are started and called as containerd
does it. All have the same bundle, the same image directory and a fresh container in each round, and
take turns. A round is a checkpoint that leaves the container running, the container's end, and a
restore.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

from shim import messages
from shim.bundle import address_in
from shim.ttrpc import Client, ConnectionClosed, connect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from shim.protowire import Message

WORK = "/run/bench"
BUNDLE, IMAGES = f"{WORK}/bundle", f"{WORK}/images/checkpoint"
STATUS = f"{BUNDLE}/rootfs/status"
NAME, NAMESPACE = "held", "bench"
SHIMS = {
    "grit": "/usr/local/bin/containerd-shim-grit-v1",
    "stock": "/usr/bin/containerd-shim-runc-v2",
}
CONFIG = "/etc/containerd/grit.toml"
LIMIT = 120.0  # seconds for a workload to fill its memory


def main() -> None:
    order = json.load(sys.stdin)
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in order["sides"]}
    for number in range(order["rounds"]):
        sides = order["sides"]
        for side in sides if number % 2 == 0 else sides[::-1]:
            print(f"  round {number + 1} of {order['rounds']}: {side}", file=sys.stderr, flush=True)
            make_bundle(order["spec"])
            program, _, engine = side.partition(" ")
            if engine:
                with open(CONFIG, "w") as file:
                    file.write(f'[grit]\nengine = "{engine}"\n{order["settings"]}')
            rounds[side].append(one_round(Runc() if program == "runc" else Shim(program)))
    json.dump(rounds, sys.stdout)


def make_bundle(spec: dict[str, Any]) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(os.path.dirname(IMAGES))
    os.makedirs(f"{BUNDLE}/work")  # where shims keep what containerd keeps on the disk
    shutil.copytree("/root/rootfs", f"{BUNDLE}/rootfs", symlinks=True)
    with open(f"{BUNDLE}/config.json", "w") as file:
        json.dump(spec, file)


def one_round(side: Runc | Shim) -> dict[str, Any]:
    side.run()
    until("the memory filled", lambda: os.path.exists(STATUS) and os.path.getsize(STATUS) > 0)
    found: dict[str, Any] = {"checkpoint": seconds(side.checkpoint)}
    found["images"] = sum(entry.stat().st_size for entry in os.scandir(IMAGES))
    try:
        with open(f"{IMAGES}/grit.json") as file:
            found["phases"] = json.load(file)["phases"]
    except FileNotFoundError:
        pass
    found["peak"] = side.peak()
    side.end()
    found["restore"] = seconds(side.restore)
    side.end()
    side.close()
    return found


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return round(time.perf_counter() - began, 6)


def until(what: str, probe: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not probe():
        if time.monotonic() > deadline:
            sys.exit(f"{what}: not within {LIMIT:.0f} s")
        time.sleep(0.01)


class Runc:
    """runc alone, as one would call it by hand."""

    def run(self) -> None:
        self._runc("run", "--detach", "--bundle", BUNDLE, NAME)

    def checkpoint(self) -> None:
        words = ["--image-path", IMAGES, "--work-path", f"{WORK}/work", "--leave-running"]
        self._runc("checkpoint", *words, NAME)

    def restore(self) -> None:
        words = ["--image-path", IMAGES, "--work-path", f"{WORK}/work", "--bundle", BUNDLE]
        self._runc("restore", "--detach", *words, NAME)

    def end(self) -> None:
        self._runc("delete", "--force", NAME)

    def close(self) -> None:
        """Nothing of it lives on."""

    def peak(self) -> int:
        return 0

    def _runc(self, *words: str) -> None:
        null = subprocess.DEVNULL
        argv = ["runc", "--root", f"{WORK}/runc", *words]
        subprocess.run(argv, check=True, stdin=null, stdout=null, stderr=null)


class Shim:
    """A shim and its one task."""

    def __init__(self, program: str) -> None:
        self._binary = SHIMS[program]

    def run(self) -> None:
        self._begin()
        self._create()
        self._call("Start", messages.ExecRequest(id=NAME))

    def checkpoint(self) -> None:
        if self._binary == SHIMS["stock"]:
            os.mkdir(IMAGES, 0o700)
        self._call("Checkpoint", messages.CheckpointTaskRequest(id=NAME, path=IMAGES))

    def restore(self) -> None:
        self._create(IMAGES)
        self._call("Start", messages.ExecRequest(id=NAME))

    def end(self) -> None:
        self._call("Kill", messages.KillRequest(id=NAME, signal=9, all=True))
        self._call("Wait", messages.ExecRequest(id=NAME))
        self._call("Delete", messages.ExecRequest(id=NAME))

    def peak(self) -> int:
        """Bytes of memory that grit's daemon has had at most; 0 for the stock shim."""
        home = f"/run/containerd/grit/{os.path.basename(self._address)}"
        try:
            with open(f"{home}/processes") as file:
                pid = next(line.split()[1] for line in file if line.startswith("outer"))
        except FileNotFoundError:
            return 0
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

    def _begin(self) -> None:
        log = f"{BUNDLE}/log"
        os.mkfifo(log)
        self._log = os.open(log, os.O_RDWR | os.O_NONBLOCK)
        words = ["-namespace", NAMESPACE, "-address", "/run/containerd/containerd.sock"]
        words += ["-publish-binary", "/usr/bin/containerd", "-id", NAME, "start"]
        started = subprocess.run(
            [self._binary, *words],
            check=True,
            cwd=BUNDLE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = started.stdout.strip()
        self._address = address_in(answer)
        version = json.loads(answer).get("version", 2) if answer.startswith("{") else 2
        self._service = messages.SERVICES[1 if version == 3 else 0]
        self._client = Client(connect(self._address))

    def _create(self, checkpoint: str = "") -> None:
        create = messages.CreateTaskRequest(id=NAME, bundle=BUNDLE, checkpoint=checkpoint)
        self._call("Create", create)

    def _call(self, method: str, request: Message) -> None:
        self._client.call(self._service, method, request.encode(), timeout=LIMIT)

    def close(self) -> None:
        try:
            self._call("Shutdown", messages.ShutdownRequest(id=NAME))
        except ConnectionClosed:
            pass  # it ends, and may do so before it has answered
        self._client.wait_closed(LIMIT)
        os.close(self._log)


if __name__ == "__main__":
    main()
