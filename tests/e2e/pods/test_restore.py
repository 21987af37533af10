"""Pods checkpointed by GRIT's agent and restored by annotation, agent and containerd unpatched."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.services import ServiceError
from tests.nodes.installed import OLD
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    MakePod = Callable[..., Pod]

SLEEP = ["/bin/sleep", "1000"]
COUNT = ["/bin/sh", "-c", "i=0; while :; do echo line $i; i=$((i+1)); sleep 0.05; done"]


@pytest.fixture
def directory(kubelet: Kubelet) -> Iterator[str]:
    """Where a pod's checkpoints go, yet to be made."""
    place = "/var/lib/grit/default/saved"
    yield place
    kubelet.node.run(["rm", "-rf", place])
    kubelet.node.path(gpu.CONFIG).write_text("")


def annotated(directory: str, **more: str) -> dict[str, str]:
    return {"grit.dev/checkpoint": directory, **more}


def unbroken(pod: Pod, name: str = "main") -> None:
    """The file goes with the memory: each count was written once, and none is missing."""
    counts = [report.counter for report in pod.reports(name)]
    assert counts == list(range(len(counts)))


@pytest.mark.cell("GRIT's agent, and restore by annotation")
@pytest.mark.parametrize("kubelet", [OLD, "13", "forky"], indirect=True)
@pytest.mark.parametrize("handler", ["grit", "grit-as-runc"])
def test_agent_unpatched(
    kubelet: Kubelet, pod: MakePod, directory: str, engine: str, handler: str
) -> None:
    """Two GPU containers of one pod: saved while they run on, and restored as another pod, with
    their files, tokens and log; the sandbox is a new one."""
    gpu.configure(kubelet.node, engine=engine)
    one = pod("train", "main", "side", handler=handler).run()
    before = {name: one.next_report(name) for name in one.ids}
    agent.checkpoint_pod(one, directory)
    assert kubelet.board
    for name, pid in one.task_pids().items():
        gpu.go_on(before.get(name) or one.next_report("main"), one.next_report(name or "main"))
        if name:
            state = kubelet.board.library.state(kubelet.node.host_pid(pid))
            assert state == (simgpu.SUCCESS, simgpu.RUNNING)
    old_ip = one.ip()
    one.remove()

    notes = annotated(directory)
    again = pod("train", "main", "side", handler=handler, annotations=notes).run()
    for name in again.ids:
        gpu.go_on(before[name], again.next_report(name))
        unbroken(again, name)
    assert again.ip() != old_ip
    assert sum(kubelet.board.owners().values()) == 2 * (4 << 20)
    assert not kubelet.node.path(f"{kubelets.TASKS}/{again.sandbox}/grit-criu.conf").exists()


def test_log_goes_on(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """The saved lines stand ahead of the new ones, none twice; a line that was on its way while
    the log was saved may be missing, for the process had written it."""
    one = pod("count", {"main": COUNT}).run()
    gpu.until("some lines", lambda: len(one.log("main")) > 5)
    agent.checkpoint_pod(one, directory)
    saved = kubelet.node.path(f"{directory}/main/container.log").read_text().splitlines()
    one.remove()

    again = pod("count", {"main": COUNT}, annotations=annotated(directory)).run()
    gpu.until("more lines", lambda: len(again.log("main")) > len(saved) + 5)
    text = kubelet.node.path(again.log_path("main")).read_text().splitlines()
    assert text[: len(saved)] == saved
    numbers = [int(line.split()[1]) for line in again.log("main")]
    assert numbers[0] == 0
    assert all(0 < after - before <= 2 for before, after in itertools.pairwise(numbers))


def test_container_without_a_checkpoint_starts(
    kubelet: Kubelet, pod: MakePod, directory: str
) -> None:
    one = pod("mixed", {"main": COUNT, "side": SLEEP}).run()
    gpu.until("some lines", lambda: len(one.log("main")) > 5)
    agent.checkpoint_pod(one, directory, ["main"])
    one.remove()

    again = pod("mixed", {"main": COUNT, "side": COUNT}, annotations=annotated(directory)).run()
    gpu.until("lines", lambda: len(again.log("side")) > 2 and len(again.log("main")) > 6)
    assert again.log("side")[0] == "line 0"
    assert "no checkpoint where the annotation points" in kubelet.node.containerd_log()


def test_container_without_a_checkpoint_fails(
    kubelet: Kubelet, pod: MakePod, directory: str
) -> None:
    """As `on_missing_checkpoint` has it; here in options written into containerd's own file."""
    kubelet.node.path(directory).mkdir(parents=True)
    one = pod("none", {"main": SLEEP}, handler="grit-inline", annotations=annotated(directory))
    one.run_sandbox()  # which has the annotation as well, and is never restored
    one.create("main")
    with pytest.raises(ServiceError, match="names no checkpoint, and on_missing_checkpoint is"):
        one.start("main")


def test_download_is_awaited(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """GRIT's manager starts pod and download at the same time; Create waits for the agent's word,
    and other containers of the pod are served meanwhile."""
    node = kubelet.node
    one = pod("late", {"main": COUNT}).run()
    gpu.until("some lines", lambda: len(one.log("main")) > 5)
    agent.checkpoint_pod(one, directory)
    saved = node.path(f"{directory}/main/container.log").read_text().splitlines()
    one.remove()
    node.path(f"{directory}/main").rename(node.path(f"{directory}-elsewhere"))

    notes = annotated(directory, **{"grit.dev/restore-name": "saved"})
    again = pod("late", {"main": COUNT, "other": SLEEP}, annotations=notes).run_sandbox()
    again.create("main")
    starting = threading.Thread(target=again.start, args=("main",))
    starting.start()
    task = f"{kubelets.TASKS}/{again.ids['main']}"
    gpu.until("Create", lambda: node.path(f"{task}/config.json").exists())
    assert again.shim_answers()
    assert again.status("main").state == kubelets.CREATED
    node.path(f"{directory}-elsewhere").rename(node.path(f"{directory}/main"))
    agent.say_downloaded(node, directory)
    starting.join(60)
    assert again.status("main").state == kubelets.RUNNING
    text = node.path(again.log_path("main")).read_text().splitlines()
    assert text[: len(saved)] == saved  # restored, not begun anew


def test_download_that_does_not_end(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """After `download_timeout` the kubelet is told why; its next attempt finds the checkpoint."""
    node = kubelet.node
    one = pod("never", {"main": COUNT}).run()
    gpu.until("some lines", lambda: len(one.log("main")) > 5)
    agent.checkpoint_pod(one, directory)
    one.remove()

    gpu.configure(node, download_timeout=0.5)
    notes = annotated(directory, **{"grit.dev/restore-name": "saved"})
    again = pod("never", {"main": COUNT}, annotations=notes).run_sandbox()
    again.create("main")
    with pytest.raises(ServiceError, match=f"{directory} is not whole after 0.5 s: .* no file"):
        again.start("main")
    agent.say_downloaded(node, directory)
    again.create("main")
    again.start("main")
    gpu.until("more lines", lambda: len(again.log("main")) > 6)
    assert again.log("main")[0] == "line 0"


def test_incomplete_checkpoint_is_never_a_reason_to_start_afresh(
    kubelet: Kubelet, pod: MakePod, directory: str
) -> None:
    one = pod("torn", {"main": COUNT}).run()
    gpu.until("some lines", lambda: len(one.log("main")) > 5)
    agent.checkpoint_pod(one, directory)
    one.remove()
    images = kubelet.node.path(f"{directory}/main/checkpoint")
    pages = next(images.glob("pages-*"))
    pages.write_bytes(pages.read_bytes()[:-4096])

    again = pod("torn", {"main": COUNT}, annotations=annotated(directory)).run_sandbox()
    again.create("main")
    with pytest.raises(ServiceError, match=f"damaged and was not restored: {pages.name}: has"):
        again.start("main")


def test_a_restore_that_fails_at_the_gpu_leaves_no_task(
    kubelet: Kubelet, pod: MakePod, directory: str
) -> None:
    """Its processes are there already. containerd tries once to delete the task, right after the
    answer: of one that has not ended by then, the pod could never be removed."""
    one = pod("lost", "main").run()
    one.next_report()
    agent.checkpoint_pod(one, directory)
    one.remove()
    again = pod("lost", "main", annotations=annotated(directory)).run_sandbox()
    again.create("main")
    assert kubelet.board
    with (
        kubelet.board.faulty("restore=304"),
        pytest.raises(ServiceError, match="it was killed"),
    ):
        again.start("main")
    assert list(again.task_pids()) == [""]
