"""The cluster's nodes: on each the kubelet's part and a real agent, one store between them; and
what a test asks of Checkpoints through kubectl."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.e2e import gpu
from tests.e2e.kube.control_plane import KUBECONFIG
from tests.e2e.pods.conftest import kubelet_on
from tests.nodes import agent_packages
from tests.nodes.installed import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.kube.control_plane import ControlPlane
    from tests.e2e.pods.kubelet import Kubelet
    from tests.nodes.node import Process

STORE = "/mnt/ckpt-store"
CLAIM = "ckpt-store"
PACKAGES = "/usr/local/lib/agent-packages"
LOG = "/var/log/grit-agent.log"
_HELD = "/usr/local/lib/held_agent.py"


class Worker:
    """A node of the cluster: the kubelet's part, and the agent."""

    def __init__(self, kubelet: Kubelet, name: str, plane: ControlPlane, settings: str) -> None:
        self.kubelet = kubelet
        self.node = kubelet.node
        self.name = name
        plane.join(self.node)
        self.node.path("/etc/grit").mkdir(exist_ok=True)
        self.node.path("/etc/grit/agent.toml").write_text(settings)
        self.node.path(_HELD).write_text(Path(__file__).with_name("held_agent.py").read_text())
        self._agent: Process | None = None
        self._held = ""

    def start_agent(self, hold: str = "") -> None:
        """`hold` names the function at which it stops: see `held_agent.py` and `until_held`."""
        self._held = hold
        words = [_HELD] if hold else ["-m", "shim.agent"]
        words += ["--node", self.name, "--kubeconfig", KUBECONFIG]
        with open(self.node.path(LOG), "ab") as log:
            self._agent = self.node.popen(
                [f"{ENVIRONMENT}/bin/python", *words],
                env={"PYTHONPATH": PACKAGES, "HOLD": hold},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def agent_pid(self) -> int:
        """In the node; 0 without one."""
        every = self.node.processes().items()
        return next((pid for pid, words in every if "--kubeconfig" in words), 0)

    def until_held(self) -> None:
        """Until the agent has come to where it is held."""

        def stopped() -> bool:
            stat = self.node.path(f"/proc/{pid}/stat").read_text()
            return stat.rpartition(") ")[2][0] == "T"

        pid = gpu.until("the agent", self.agent_pid)
        try:
            gpu.until("the agent to stop where it is held", stopped)
        except AssertionError as error:
            raise AssertionError(f"{error}; its log: {self.log()}") from None

    def kill_agent(self) -> None:
        """SIGKILL; returns when it is gone."""
        assert self._agent
        self._agent.kill()
        self._agent.wait(30)
        self._agent = None
        gpu.until("the agent's end", lambda: not self.agent_pid())

    def let_agent_run(self) -> None:
        """Whatever a test did with it."""
        if self._agent and self._held:
            self.kill_agent()
        if not self._agent:
            self.start_agent()

    def log(self) -> str:
        return self.node.path(LOG).read_text()[-4000:]


@contextlib.contextmanager
def two(
    plane: ControlPlane, store: Path, settings: str, **stores: str
) -> Iterator[tuple[Worker, Worker]]:
    """containerd 1.7 as node-a, 2.1 as node-b, their agents started. `store` is a directory of the
    host's, which both have; `stores` are more claims, and their directories in the node."""
    lines = [f'{claim} = "{place}"\n' for claim, place in {CLAIM: STORE, **stores}.items()]
    settings = f"{settings}[stores]\n{''.join(lines)}"
    with contextlib.ExitStack() as stack:
        a, b = (
            stack.enter_context(
                kubelet_on(
                    name,
                    subnet=subnet,
                    shares={STORE: store},
                    binds={**gpu.kit_binds(), PACKAGES: agent_packages.directory(name)},
                )
            )
            for subnet, name in enumerate(("13", "forky"), 1)
        )
        both = Worker(a, "node-a", plane, settings), Worker(b, "node-b", plane, settings)
        for worker in both:
            worker.start_agent()
        yield both
        for worker in both:
            worker.kill_agent()


def checkpoint(
    plane: ControlPlane,
    name: str,
    pod: str,
    notes: dict[str, str] | None = None,
    claim: str = CLAIM,
    **spec: Any,
) -> None:
    """Applies a Checkpoint with these annotations."""
    manifest = {
        "apiVersion": "kaito.sh/v1alpha1",
        "kind": "Checkpoint",
        "metadata": {"name": name, "namespace": "default", "annotations": notes or {}},
        "spec": {"podName": pod, "volumeClaim": {"claimName": claim}, **spec},
    }
    plane.apply(json.dumps(manifest))


def ended(
    plane: ControlPlane, workers: tuple[Worker, ...], name: str, phase: str
) -> dict[str, Any]:
    """The Checkpoint once it has finished, which has to be with `phase`."""
    wait = ("wait", "--for=jsonpath={.status.finishedAt}", "--timeout=50s", f"checkpoint/{name}")
    waited = plane.kubectl(*wait, check=False)
    one: dict[str, Any] = plane.get("checkpoint", name)
    status = one.get("status", {})
    if waited.returncode or status["phase"] != phase:
        raise AssertionError([waited.stderr, status, *(worker.log() for worker in workers)])
    return one


def why(one: dict[str, Any]) -> str:
    """Its condition: status, reason, message."""
    (condition,) = [c for c in one["status"]["conditions"] if c["type"] == "Checkpointed"]
    return f"{condition['status']} {condition['reason']}: {condition['message']}"
