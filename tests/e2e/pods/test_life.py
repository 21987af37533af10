"""Many pods, and what becomes of pods when something dies or is taken away: beside the stock shim,
on the same containerd."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.conftest import kubelet_on, leave_nothing
from tests.e2e.pods.services import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    Clean = Callable[[Kubelet], Kubelet]

SLEEP = ["/bin/sleep", "1000"]
COUNT = ["/bin/sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.1; done"]
SIDES = ("runc", "grit")
DIRECTORY = "/var/lib/grit/default/many"


@pytest.fixture(scope="module", params=["13", "forky"])
def own(request: pytest.FixtureRequest) -> Iterator[Kubelet]:
    """A node whose containerd may be killed."""
    with kubelet_on(request.param, subnet=5) as kubelet:
        yield kubelet


@pytest.fixture
def place(own: Kubelet, clean: Clean) -> Kubelet:
    return clean(own)


@pytest.mark.parametrize("own", ["forky"], indirect=True)
def test_twenty_pods(own: Kubelet) -> None:
    """Created, checkpointed and deleted, ten at a time, one of them with a GPU: nothing is left."""
    before = own.node.leaks()
    for turn in range(2):
        pods = [own.pod(f"pod-{turn}-{number}", {"main": COUNT}).run() for number in range(9)]
        pods.append(own.gpu_pod(f"pod-{turn}-gpu").run())
        for one in pods:
            agent.checkpoint_pod(one, f"{DIRECTORY}/{one.name}")
            assert one.status("main").state == kubelets.RUNNING
        pods[-1].next_report()
        for one in pods:
            one.remove()
        own.node.run(["rm", "-rf", DIRECTORY])
    leave_nothing(own, before)
    # What the clients of checkpoints leave in containerd is theirs; of containers there is nothing.
    assert own.node.ctr("-n", kubelets.NAMESPACE, "containers", "ls", "-q").stdout == ""


def both(place: Kubelet, do: Callable[[Pod], Any]) -> dict[str, Any]:
    """What comes of the same under either shim."""
    outcomes = {}
    for side in SIDES:
        one = place.pod(f"under-{side}", {"main": COUNT, "side": SLEEP}, handler=side).run()
        gpu.until("a line", lambda one=one: one.log("main"))
        outcomes[side] = do(one)
        one.remove()
    return outcomes


def shim_of(one: Pod) -> int:
    """The pid in the node of the process that containerd talks to for this pod."""
    name = {"grit": "containerd-shim-grit-v1", "runc": "containerd-shim-runc-v2"}[one.handler]
    for pid, words in one.node.processes().items():
        if any(word.endswith(name) for word in words) and one.sandbox in words:
            return pid
    raise AssertionError(f"no shim of {one.sandbox}: {one.node.processes()}")


def test_shim_killed(place: Kubelet) -> None:
    """Sandbox and containers are told as ended. Under grit they are; under the stock shim of
    containerd 2.1 the containers run on, unknown to anybody, and on both its socket stays."""
    node = place.node
    survivors = {}

    def do(one: Pod) -> Any:
        pids = one.task_pids()
        sockets = node.leaks().sockets
        os.kill(node.host_pid(shim_of(one)), signal.SIGKILL)
        for name in one.ids:
            gpu.until("the end", lambda name=name: one.status(name).state == kubelets.EXITED)
        gpu.until("not ready", lambda: one.sandbox_state() == 1)
        gpu.until("its end", lambda: pids[""] not in node.processes())
        if one.handler == "grit":
            gpu.until("all ends", lambda: not pids.values() & node.processes().keys())
            gpu.until("its sockets' end", lambda: len(node.leaks().sockets) == len(sockets) - 2)
        survivors[one.handler] = [pid for pid in pids.values() if pid in node.processes()]
        for name, pid in pids.items():
            if pid in survivors[one.handler]:  # what nobody else will do
                runc = ["runc", "--root", f"/run/containerd/runc/{kubelets.NAMESPACE}"]
                node.run([*runc, "delete", "--force", one.ids[name]])
        gpu.until("all ends", lambda: not pids.values() & node.processes().keys())
        if one.handler == "runc":
            for socket in node.leaks().sockets & sockets:
                node.path(f"/run/containerd/{socket}").unlink(missing_ok=True)
        return one.status("main").exit_code, one.status("side").exit_code

    outcomes = both(place, do)
    assert outcomes["grit"] == outcomes["runc"]
    assert survivors["grit"] == []


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_containerd_restarted(place: Kubelet, how: str) -> None:
    """Pods run on, their logs too, and containerd has them again."""

    def do(one: Pod) -> Any:
        before = one.task_pids(), one.ip()
        node = place.node
        node.stop_containerd() if how == "stop" else node.kill_containerd()
        node.start_containerd(env=gpu.ENVIRONMENT_OF_GRIT)
        gpu.until("CRI", place.runs)
        assert (one.task_pids(), one.ip()) == before
        assert one.shell("side", "echo here") == "here\n"
        lines = len(one.log("main"))
        gpu.until("more lines", lambda: len(one.log("main")) > lines)
        one.stop("main")
        return one.status("main").state, one.status("main").exit_code

    outcomes = both(place, do)
    assert outcomes["grit"] == outcomes["runc"] == (kubelets.EXITED, 137)


def test_containerd_restarted_between_checkpoint_and_restore(place: Kubelet) -> None:
    one = place.gpu_pod("train").run()
    before = one.next_report()
    place.node.kill_containerd()
    place.node.start_containerd(env=gpu.ENVIRONMENT_OF_GRIT)
    gpu.until("CRI", place.runs)
    agent.checkpoint_pod(one, DIRECTORY)
    one.remove()
    again = place.gpu_pod("train", annotations={"grit.dev/checkpoint": DIRECTORY}).run()
    gpu.go_on(before, again.next_report())
    place.node.run(["rm", "-rf", DIRECTORY])


def test_images_removed(place: Kubelet) -> None:
    """Running containers do not need it; new ones cannot be created, restored or not, until it is
    back: the kubelet pulls it then."""

    def do(one: Pod) -> Any:
        place.cri("RemoveImage", image={"image": kubelets.IMAGE})
        lines = len(one.log("main"))
        gpu.until("more lines", lambda: len(one.log("main")) > lines)
        assert one.shell("side", "ls /bin/busybox") == "/bin/busybox\n"
        with pytest.raises(ServiceError) as told:
            one.create("main")
        place.import_images()
        return str(told.value).split(":")[-1]

    outcomes = both(place, do)
    assert outcomes["grit"] == outcomes["runc"]
    one = place.gpu_pod("train").run()
    before = one.next_report()
    agent.checkpoint_pod(one, DIRECTORY)
    one.remove()
    place.cri("RemoveImage", image={"image": kubelets.IMAGE})
    place.import_images()
    again = place.gpu_pod("train", annotations={"grit.dev/checkpoint": DIRECTORY}).run()
    gpu.go_on(before, again.next_report())
    place.node.run(["rm", "-rf", DIRECTORY])
