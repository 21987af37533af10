"""A container's plain life under one runtime, in the words `ctr` has for it, so that the same
scenario can be played under the stock shim and under ours and its outcomes laid side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import bundle, messages
from shim.ttrpc import Client, StatusError, connect
from tests.e2e.gpu import CONFIG, GRIT, IMAGE, STOCK, until
from tests.nodes.installed import SHIM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from shim.protowire import Message
    from tests.nodes.node import Node, Snapshot

RUNTIMES = {
    "stock": ["--runtime", STOCK],
    "grit": ["--runtime", GRIT, "--runtime-config-path", CONFIG],
    "path": ["--runtime", SHIM],
}
"""By path, the options come in the stock shim's own form."""

BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
FOR_EVER = ("sh", "-c", "trap 'exit 7' TERM; : > /ready; while :; do sleep 1 & wait; done")
"""Ends at once, with status 7, when it is asked to."""


def group(name: str, key: str = "io.containerd.runc.v2.group") -> str:
    """The flag of `ctr run` that makes containers share a shim."""
    return f"--annotation={key}={name}"


Outcome = tuple[int, str, str]
"""Exit status, standard output, standard error."""


class Side:
    """One container under one runtime. Its name is the same on every side, so outcomes that
    name it need no translation; `end` must have been called before the next side's turn."""

    def __init__(self, node: Node, runtime: str, name: str = "box") -> None:
        self.node = node
        self.runtime = runtime
        self.name = name

    def ctr(self, *words: str, **options: Any) -> Outcome:
        options.setdefault("timeout", 20)
        done = self.node.ctr(*words, check=False, **options)
        return done.returncode, done.stdout, plain(done.stderr)

    def run_words(self, *command: str, flags: Iterable[str] = ()) -> list[str]:
        return ["run", *RUNTIMES[self.runtime], *flags, IMAGE, self.name, *command]

    def run(self, *command: str, flags: Iterable[str] = (), **options: Any) -> Outcome:
        return self.ctr(*self.run_words(*command, flags=flags), **options)

    def start(self, *command: str, flags: Iterable[str] = ()) -> Side:
        """`ctr run -d`, which must go well; FOR_EVER unless told, and then when it is ready."""
        self.node.ctr(*self.run_words(*(command or FOR_EVER), flags=["-d", *flags]))
        if not command:
            until("readiness", (self.bundle() / "rootfs/ready").exists)
        return self

    def exec(self, *command: str, **options: Any) -> Outcome:
        return self.ctr("task", "exec", "--exec-id", "extra", self.name, *command, **options)

    def kill(self, *words: str) -> Outcome:
        return self.ctr("task", "kill", *words, self.name)

    def status(self) -> str:
        """As `ctr task ls` has it; "" without a task."""
        for line in self.node.ctr("task", "ls").stdout.splitlines()[1:]:
            name, _, status = line.split()
            if name == self.name:
                return status
        return ""

    def pid(self) -> int:
        """The pid of the container's init in the node."""
        for line in self.node.ctr("task", "ls").stdout.splitlines()[1:]:
            name, pid, _ = line.split()
            if name == self.name:
                return int(pid)
        raise AssertionError(f"no task {self.name}")

    def until_stopped(self) -> str:
        return until("the task's end", lambda: self.status() if self.status() != "RUNNING" else "")

    def until_forgotten(self) -> None:
        """Until containerd knows the task no more. After the death of its shim it is listed no
        more at once, but found, and called by another error, until all has been cleaned up."""
        gone = f"task {self.name} not found"
        until("the task's end", lambda: gone in self.ctr("task", "pause", self.name)[2])

    def end(self) -> None:
        """Kills and removes whatever there is of it."""
        self.kill("--signal", "SIGKILL")
        until("the task's end", lambda: self.status() in ("STOPPED", ""))
        self.ctr("task", "delete", self.name)
        self.ctr("container", "delete", self.name)

    # --- the shim itself ------------------------------------------------------------------

    def bundle(self) -> Path:
        return self.node.path(f"{BUNDLES}/{self.name}")

    def address(self) -> str:
        """Where the shim that serves the container listens, as the node sees it."""
        return bundle.read_address(str(self.bundle()))

    def call(self, method: str, request: Message | bytes, service: str = "") -> tuple[int, Any]:
        """One call of the task service, straight to the shim: (0, payload) or (code, message)."""
        version = 3 if self.node.name == "forky" else 2
        socket = self.node.path(self.address().removeprefix("unix://"))
        client = Client(connect(f"unix://{socket}"))
        payload = request if isinstance(request, bytes) else request.encode()
        try:
            name = service or f"containerd.task.v{version}.Task"
            return 0, client.call(name, method, payload, timeout=20)
        except StatusError as error:
            return error.code, error.message
        finally:
            client.close()

    def shim_pid(self) -> int:
        """The pid in the node of the process that containerd speaks to."""
        return self.stock_pid() if self.runtime == "stock" else self._processes()["outer"]

    def stock_pid(self) -> int:
        """The pid in the node of the stock shim: underneath ours, or alone."""
        _, reply = self.call("Connect", messages.TaskRequest(id=self.name))
        return messages.ConnectResponse.decode(reply).shim_pid

    def _processes(self) -> dict[str, int]:
        home = self.node.path("/run/containerd/grit") / os.path.basename(self.address())
        rows = (home / "processes").read_text().splitlines()
        return {row.split()[0]: int(row.split()[1]) for row in rows}


def plain(text: str) -> str:
    """Error text without what differs from call to call: times, pids, snapshot numbers."""
    text = re.sub(r'time="[^"]*" ?', "", text)
    return re.sub(r"\b(pid|exec)[ =:]\d+", r"\1 N", text)


def compare(
    node: Node,
    scenario: Callable[[Side], object],
    others: Iterable[str] = ("grit",),
) -> None:
    """Plays the scenario under the stock shim, then under each other runtime: the outcomes must
    be equal, and nothing may be left behind, but as many directories of fifos as with stock: ctr
    removes a task's when it deletes the task, and one that ended with its shim it cannot delete.
    """
    before = node.leaks()
    expected = _play(node, "stock", scenario)
    fifos = len(_fifos(node.leaks() - before))
    for runtime in others:
        before = node.leaks()
        assert _play(node, runtime, scenario) == expected, f"{runtime} differs from stock"
        nothing_left(node, before, fifos)


def _play(node: Node, runtime: str, scenario: Callable[[Side], object]) -> object:
    side = Side(node, runtime)
    try:
        return scenario(side)
    finally:
        side.end()


def nothing_left(node: Node, before: Snapshot, fifos: int = 0) -> None:
    """Shims take a moment to go; what then stays is a leak, but for a number of directories of
    fifos."""

    def left() -> list[str]:
        more = node.leaks() - before
        found = sorted(more.processes | more.mounts | more.sockets | more.cgroups)
        its_fifos = _fifos(more)
        found += sorted(more.directories - its_fifos)
        return found + sorted(its_fifos if len(its_fifos) > fifos else [])

    with contextlib.suppress(AssertionError):
        until("all gone", lambda: not left(), 15)
    if found := left():
        raise AssertionError(f"left behind: {', '.join(found)}")


def _fifos(snapshot: Snapshot) -> frozenset[str]:
    """The directories of the containers' stdio, which ctr makes and removes."""
    return frozenset(name for name in snapshot.directories if name.startswith("fifo/"))


class Terminal:
    """A command of the node on a terminal of its own."""

    def __init__(self, node: Node, *argv: str) -> None:
        self._master, slave = pty.openpty()
        self.process = node.popen(argv, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, wanted: str, seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while wanted not in self.text:
            left = deadline - time.monotonic()
            assert left > 0, f"{wanted!r} not seen on the terminal, but {self.text!r}"
            if select.select([self._master], [], [], left)[0]:
                self.text += os.read(self._master, 4096).decode()

    def close(self) -> int:
        """The exit status, when it has ended."""
        status = self.process.wait(20)
        os.close(self._master)
        return status


class Events:
    """`ctr events` while a scenario runs: topic and what of each event any shim must agree on."""

    def __init__(self, node: Node, name: str = "box") -> None:
        self._name = name
        self._listens = False
        self.seen: list[tuple[str, str, int]] = []
        self._process = node.popen(["ctr", "events"], stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        until("ctr events listening", lambda: self._heard(node))

    def _heard(self, node: Node) -> bool:
        """containerd keeps no event for those who come late: one of ours says that it listens."""
        node.ctr("namespaces", "label", "default", f"heard={time.monotonic()}")
        return self._listens

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._listens = True
            match = re.search(r" (/tasks/\S+) (\{.*\})", line)
            if match:
                event = json.loads(match[2])
                if event.get("container_id") == self._name:
                    process = event.get("exec_id") or event.get("id") or ""
                    self.seen.append((match[1], process, event.get("exit_status", 0)))

    def until(self, topic: str, count: int = 1) -> None:
        until(f"event {topic}", lambda: [event[0] for event in self.seen].count(topic) >= count)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()
