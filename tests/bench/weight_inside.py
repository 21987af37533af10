"""The part of the bench that runs on the node, with the installed shim's interpreter. Prints one
JSON object: samples by figure and by runtime, in seconds. Grit and stock take turns, so that
whatever else the machine does falls on both. Leaves no container behind when it ends well.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable

from shim import messages
from shim.bundle import address_in
from shim.protowire import Message
from shim.ttrpc import Client, ConnectionClosed, connect

IMAGE = "docker.io/local/busybox:1"
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
RUNTIMES = {"grit": "io.containerd.grit.v1", "stock": "io.containerd.runc.v2"}
SHIMS = {
    "grit": "/usr/local/bin/containerd-shim-grit-v1",
    "stock": "/usr/bin/containerd-shim-runc-v2",
}
# ctr gives every container some, which cannot be granted where the host keeps that controller in
# cgroup v1.
CPU = "--cpu-shares=0"
SLEEP = ["/bin/sh", "-c", "while :; do sleep 1000; done"]

Samples = dict[str, dict[str, list[float]]]


def main(rounds: int, calls: int) -> None:
    samples: Samples = {}
    run("grit", "other")
    for measure in (run_detached, run_to_end, delete):
        print(f"  {measure.__name__}", file=sys.stderr, flush=True)
        for number in range(rounds):
            for runtime in order(number):
                note(samples, measure.__name__, runtime, measure(runtime))
    print("  start", file=sys.stderr, flush=True)
    for number in range(rounds):
        for runtime in order(number):
            wall, cpu = start(runtime)
            note(samples, "start", runtime, wall)
            note(samples, "start_cpu", runtime, cpu)
    remove("other")
    print("  state, checkpoint", file=sys.stderr, flush=True)
    state_calls(samples, calls)
    checkpoints(samples, rounds)
    json.dump(samples, sys.stdout)


def order(number: int) -> list[str]:
    """Who comes first changes from round to round."""
    names = list(RUNTIMES)
    return names if number % 2 == 0 else names[::-1]


def note(samples: Samples, figure: str, runtime: str, value: float) -> None:
    samples.setdefault(figure, {}).setdefault(runtime, []).append(round(value, 6))


def ctr(*words: str) -> None:
    # It tells of every task that was killed.
    null = subprocess.DEVNULL
    subprocess.run(["ctr", *words], check=True, stdout=null, stderr=null)


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def run(runtime: str, name: str, *flags: str) -> None:
    ctr("run", "--detach", f"--runtime={RUNTIMES[runtime]}", CPU, *flags, IMAGE, name, *SLEEP)


def remove(name: str) -> None:
    ctr("task", "rm", "--force", name)
    ctr("container", "rm", name)


def run_detached(runtime: str) -> float:
    taken = seconds(lambda: run(runtime, "one"))
    remove("one")
    return taken


def run_to_end(runtime: str) -> float:
    words = ["run", "--rm", f"--runtime={RUNTIMES[runtime]}", CPU, IMAGE, "one", "/bin/true"]
    return seconds(lambda: ctr(*words))


def delete(runtime: str) -> float:
    """The shim's `delete`, as containerd calls it after the end of a task whose shim lives."""
    bundle = f"{BUNDLES}/gone"
    os.makedirs(f"{bundle}/rootfs")
    with open(f"{bundle}/config.json", "w") as file:
        file.write("{}")
    with open(f"{bundle}/address", "w") as file:
        file.write(address_in(answer_of("other")))
    flags = ["-namespace", "default", "-address", "/run/containerd/containerd.sock"]
    flags += ["-publish-binary", "/usr/bin/containerd", "-id", "gone", "-bundle", bundle]
    pipe = subprocess.PIPE
    try:
        return seconds(
            lambda: subprocess.run(
                [SHIMS[runtime], *flags, "delete"],
                check=False,
                cwd=bundle,
                stdout=pipe,
                stderr=pipe,
            )
        )
    finally:
        subprocess.run(["rm", "-rf", bundle], check=True)


def start(runtime: str) -> tuple[float, float]:
    """The shim's `start` as containerd calls it in a new bundle, to its answer: seconds, and those
    of processor time (of all that has ended by then, so without the daemons')."""
    bundle = f"{BUNDLES}/new"
    os.makedirs(f"{bundle}/rootfs")
    with open(f"{bundle}/config.json", "w") as file:
        file.write('{"annotations": {}}')
    os.mkfifo(f"{bundle}/log")
    log = os.open(f"{bundle}/log", os.O_RDWR | os.O_NONBLOCK)
    flags = ["-namespace", "default", "-address", "/run/containerd/containerd.sock"]
    flags += ["-publish-binary", "/usr/bin/containerd", "-id", "new", "start"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [SHIMS[runtime], *flags],
        check=True,
        cwd=bundle,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    taken = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shim = Shim(done.stdout.strip(), "new")
    shim.shut_down()
    os.close(log)
    subprocess.run(["rm", "-rf", bundle], check=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return taken, cpu


def read(path: str) -> str:
    with open(path) as file:
        return file.read().strip()


def answer_of(name: str) -> str:
    """What containerd recorded of the shim that serves a container."""
    for record in ("bootstrap.json", "address"):
        if os.path.exists(f"{BUNDLES}/{name}/{record}"):
            return read(f"{BUNDLES}/{name}/{record}")
    raise LookupError(f"no address of {name}'s shim")


def group_of(name: str) -> str:
    return f"/run/containerd/grit/{os.path.basename(address_in(answer_of(name)))}"


class Shim:
    """A shim to call, about one task."""

    def __init__(self, answer: str, task: str) -> None:
        version = json.loads(answer).get("version", 2) if answer.startswith("{") else 2
        self._service = messages.SERVICES[1 if version == 3 else 0]
        self._client = Client(connect(address_in(answer)))
        self._task = task

    def call(self, method: str, request: Message | None = None) -> bytes:
        asked = request if request is not None else messages.TaskRequest(id=self._task)
        return self._client.call(self._service, method, asked.encode())

    def shut_down(self) -> None:
        try:
            self.call("Shutdown", messages.ShutdownRequest(id=self._task, now=True))
        except ConnectionClosed:
            pass  # it ends, and may do so before it has answered
        self._client.wait_closed()


def state_calls(samples: Samples, calls: int) -> None:
    """State, asked of the inner shim directly and through grit."""
    run("grit", "one")
    inner = Shim(read(f"{group_of('one')}/answer"), "one")
    outer = Shim(answer_of("one"), "one")
    for _ in range(calls):
        note(samples, "state", "stock", seconds(lambda: inner.call("State")))
        note(samples, "state", "grit", seconds(lambda: outer.call("State")))
    remove("one")


def checkpoints(samples: Samples, rounds: int) -> None:
    """Pause, Checkpoint and Resume of a container without a GPU, asked of the shim."""
    shims = {}
    for runtime in RUNTIMES:
        run(runtime, runtime)
        shims[runtime] = Shim(answer_of(runtime), runtime)
    for number in range(rounds):
        for runtime in order(number):
            request = messages.CheckpointTaskRequest(id=runtime, path=f"/tmp/images/{runtime}")
            os.makedirs(request.path, mode=0o700)

            def whole(shim: Shim = shims[runtime], request: Message = request) -> None:
                shim.call("Pause")
                shim.call("Checkpoint", request)
                shim.call("Resume")

            note(samples, "checkpoint", runtime, seconds(whole))
            subprocess.run(["rm", "-r", request.path], check=True)
    for runtime in RUNTIMES:
        remove(runtime)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
