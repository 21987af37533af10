"""GRIT's quick start, steps 3 to 5, between two nodes that one machine plays: by kubectl the
Checkpoint of a pod on the one, its files verified, the pod removed, the Restore, and its successor
on the other. GPUs and job may be real or simulated."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import places
from tests.gpu import kube
from tests.gpu.job import reports, same, until
from tests.gpu.machine import HOME, Machine, prepare
from tests.gpu.played import PlayedNode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.e2e.pods.kubelet import Kubelet
    from tests.gpu.kube import Given
    from tests.gpu.results import Results

NAMES = ("node-a", "node-b")
LABELS = {"app": "train"}
VOLUME = HOME.with_name("grit-gpu-nodes") / "volume"
"""What the pods have in /job, on whichever node."""
SECONDS = 90.0
"""For whatever is waited for."""
_FAILURES = Path(places.FAILURES)


@dataclass(frozen=True)
class Workload:
    """A job that reports to /job/status; what is named `constant` must stay as it is."""

    argv: Sequence[str]
    constant: Sequence[str]


@dataclass(frozen=True)
class Cards:
    """The GPUs: which each of NAMES has, what its pods are given, and bytes in use on one."""

    of: Sequence[int]
    given: Callable[[PlayedNode, int], Given]
    used: Callable[[int], int]


@dataclass
class Transcript:
    """What was seen, and when: seconds from its start."""

    lines: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        self.lines.append(f"{time.monotonic() - self.began:7.2f}  {text}")
        print(self.lines[-1], flush=True)

    @contextlib.contextmanager
    def timed(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.say(f"# {text}: {time.monotonic() - began:.2f} s")


class Watch:
    """`kubectl get KIND --watch`, whose lines go to the transcript."""

    def __init__(self, plane: kube.HostPlane, kind: str, transcript: Transcript) -> None:
        words = plane.command("get", kind, "--watch")
        self._process = plane.node.popen(words, stdout=subprocess.PIPE)
        self._kind, self._transcript = kind, transcript
        self._phases: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            with self._news:
                self._transcript.say(f"{self._kind}  {line.rstrip()}")
                self._phases += line.split()[1:2]
                self._news.notify_all()

    def until(self, phase: str) -> None:
        """Until the one resource there is has come to it; AssertionError if that fails."""
        with self._news:
            self._news.wait_for(lambda: {phase, "Failed"} & {*self._phases}, SECONDS)
        assert phase in self._phases, f"{self._kind}: {self._phases}, and not {phase}"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()


@contextlib.contextmanager
def _kept(logs: Path, nodes: Sequence[PlayedNode], plane: kube.HostPlane) -> Iterator[None]:
    """At the end, and above all after a failure, brings all logs together."""
    try:
        yield
    except BaseException:
        for kind in ("checkpoint", "restore"):
            told = plane.kubectl("get", kind, "-o", "yaml", check=False).stdout
            (logs / f"{kind}s.yaml").write_text(told)
            print(told, flush=True)
        raise
    finally:
        for node in nodes:
            (logs / f"{node.name}.containerd.log").write_text(node.log())
        for name in ("apiserver", "etcd"):
            (logs / f"{name}.log").write_text(plane.log(name))
        for file in itertools.chain(_FAILURES.glob("*"), VOLUME.glob("status")):
            shutil.copy(file, logs)
        for file in Path("/var/log/pods").glob("*/main/*.log"):
            shutil.copy(file, logs / f"{file.parts[-3].split('_')[1]}.{file.name}")


def quick_start(
    workload: Workload, cards: Cards, store: Path, results: Results, host: Machine | None = None
) -> None:
    """All of it. `store` is the directory that both nodes have for the claim of the examples."""
    logs = results.directory / "two-nodes"
    logs.mkdir(exist_ok=True)
    transcript = Transcript()
    with contextlib.ExitStack() as stack:
        with transcript.timed("the kit"):
            prepare()
            shutil.rmtree(VOLUME, ignore_errors=True)
            shutil.copytree(Path(__file__).parent / "workloads", VOLUME)
        with transcript.timed("API server and etcd"):
            plane = stack.enter_context(kube.HostPlane(host or Machine()))
            plane.apply_packaged()
        with transcript.timed("two nodes, each with containerd and agent"):
            nodes = [stack.enter_context(PlayedNode(name)) for name in NAMES]
            nodes[0].configure(lock_timeout=30)
            kubelets = [stack.enter_context(kube.kubelet_on(node)) for node in nodes]
            given = [cards.given(*pair) for pair in zip(nodes, cards.of, strict=True)]
            for node in nodes:
                log = logs / f"{node.name}.agent.log"
                stack.enter_context(kube.agent_on(node, store, log, node.name))
            stack.enter_context(_kept(logs, nodes, plane))
            for node in nodes:
                until(f"the agent of {node.name}", node.path(places.INTENTS).exists)
        try:
            facts = _move(workload, cards, plane, kubelets, given, transcript)
        finally:
            results.transcript("the quick start on two nodes", transcript.lines)
    results.finding("the quick start on two nodes", **facts)


def _move(
    workload: Workload,
    cards: Cards,
    plane: kube.HostPlane,
    kubelets: Sequence[Kubelet],
    given: Sequence[Given],
    transcript: Transcript,
) -> dict[str, Any]:
    status = VOLUME / "status"
    constant = workload.constant
    idle = [cards.used(card) for card in cards.of]

    def pod(number: int, name: str) -> kube.HostPod:
        return kube.HostPod(
            kubelets[number],
            name,
            {"main": workload.argv},
            given=given[number],
            labels=LABELS,
            mounts={"/job": str(VOLUME)},
        )

    def used() -> str:
        every = {card: cards.used(card) for card in cards.of}
        return ", ".join(f"GPU {card}: {count >> 20} MiB" for card, count in every.items())

    def waited(kind: str, phase: str) -> None:
        """What a user types, who does not watch."""
        words = [
            "wait",
            f"--for=jsonpath={{.status.phase}}={phase}",
            f"{kind}/demo",
            "--timeout=9s",
        ]
        transcript.say(f"$ kubectl {' '.join(words)}")
        transcript.say(plane.kubectl(*words).stdout.rstrip())

    with transcript.timed("pod train on node-a reports"):
        first = pod(0, "train").run()
        before = kube.reported(status, first)
    transcript.say(f"# {used()}")
    watches = {kind: Watch(plane, kind, transcript) for kind in ("checkpoint", "restore")}
    try:
        transcript.say("$ kubectl apply -f packaging/kubernetes/examples/checkpoint.yaml")
        with transcript.timed("to Checkpointed"):
            plane.apply((kube.EXAMPLES / "checkpoint.yaml").read_text())
            watches["checkpoint"].until("Checkpointed")
        waited("ckpt", "Checkpointed")
        saved = plane.get("checkpoint", "demo")["status"]
        assert saved["nodeName"] == "node-a"
        same(before, kube.reported(status, first), constant)  # it runs on
        transcript.say(f"$ gritctl verify --no-node {saved['dataPath']}      # on node-b")
        told = kube.gritctl(kubelets[1].node, "verify", "--no-node", saved["dataPath"])
        for line in told.splitlines():
            transcript.say(line)
        transcript.say("$ kubectl delete pod train                 # CRI on node-a")
        first.remove()
        until("device memory is free", lambda: cards.used(cards.of[0]) <= idle[0] + (64 << 20))
        ended = len(reports(status))

        transcript.say("$ kubectl apply -f packaging/kubernetes/examples/restore.yaml")
        plane.apply((kube.EXAMPLES / "restore.yaml").read_text())
        watches["restore"].until("Created")
        waited("rst", "Created")
        intents = kubelets[1].node.path(places.INTENTS)
        until("a pending Restore on node-b", lambda: list(intents.glob("*.pending")))
        transcript.say("# pod train-2 on node-b")
        with transcript.timed("from the pod to Restored"):
            second = pod(1, "train-2").run()
            watches["restore"].until("Restored")
        restored = plane.get("restore", "demo")["status"]
        assert restored["nodeName"] == "node-b"
        after = kube.reported(status, second)
        transcript.say(f"# {used()}")
        for kind in watches:
            for line in plane.kubectl("get", kind).stdout.splitlines():
                transcript.say(line)
    finally:
        for watch in watches.values():
            watch.end()
    same(before, after, constant)
    # From its state, not from its start: then it would have counted from 1 again.
    lines = reports(status)
    assert [line["counter"] for line in lines].count(1) == 1
    assert {line["pid"] for line in lines} == {before["pid"]}
    assert len(lines) > ended
    if cards.of[0] != cards.of[1]:
        assert cards.used(cards.of[1]) > idle[1]
        assert cards.used(cards.of[0]) <= idle[0] + (64 << 20)
    second.remove()
    return {
        "GPUs": " to ".join(map(str, cards.of)),
        "checkpoint": saved["phase"],
        "bytes": saved["progress"]["bytes"],
        "restore": restored["phase"],
        "counter": f"{before['counter']} to {after['counter']}",
        **{name: after[name] for name in constant},
    }
