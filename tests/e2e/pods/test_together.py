"""Containers of one pod paused and saved at one instant, whatever sequence their clients use, so
that what they share agrees; and let go again, whatever becomes of the clients."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.services import ServiceError
from tests.nodes import cache
from tests.nodes.image import build_image, reference
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    MakePod = Callable[..., Pod]

TOGETHER = {"grit.dev/together": "true"}
IMAGE = reference("local/pair", "1")
VOLUMES = {"shared": "/shared"}


@pytest.fixture(scope="session")
def pair_image() -> Path:
    """The pair program, in an image."""
    source = Path(__file__).with_name("pair.c")
    digest = cache.digest(source.read_text())
    folder = cache.entry(cache.directory() / "pair" / digest, lambda draft: _compile(source, draft))
    return build_image("local/pair", "1", {"/pair": folder / "pair"})


def _compile(source: Path, folder: Path) -> None:
    words = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", str(folder / "pair"), str(source)]
    subprocess.run(words, check=True)


@pytest.fixture
def directory(kubelet: Kubelet, pair_image: Path) -> Iterator[str]:
    kubelet.import_image(pair_image, IMAGE)
    place = "/var/lib/grit/default/pair"
    yield place
    kubelet.node.run(["rm", "-rf", place])
    kubelet.node.path(gpu.CONFIG).write_text("")


def pair(pod: MakePod, **annotations: str) -> Pod:
    command = {role: ["/pair", role, "/dev/shm/pair", "/shared"] for role in ("a", "b")}
    notes = {key.replace("_", "/"): value for key, value in annotations.items()}
    return pod("pair", command, image=IMAGE, volumes=VOLUMES, annotations=notes)


def goes_on(one: Pod) -> None:
    """Both pass the number on, and neither has found anything amiss."""
    before = {name: len(one.log(name)) for name in one.ids}
    gpu.until("hundreds", lambda: all(len(one.log(n)) > before[n] + 1 for n in before))
    for name in one.ids:
        assert not [line for line in one.log(name) if "DISAGREE" in line]
        numbers = [int(line) for line in one.log(name)]
        assert numbers == sorted(set(numbers))


def statuses(one: Pod) -> dict[str, str]:
    """What containerd says of each container's task."""
    lines = one.node.ctr("-n", kubelets.NAMESPACE, "task", "ls").stdout.splitlines()[1:]
    found = {words[0]: words[2] for words in map(str.split, lines)}
    return {name: found[identity] for name, identity in one.ids.items() if identity in found}


def frozen(one: Pod, name: str) -> bool:
    """Whether the container's control group is frozen."""
    for root in one.node.cgroup_roots():
        group = root / f"kubepods/pod{one.uid}/{one.ids[name]}"
        for file, word in (("freezer.state", "FROZEN"), ("cgroup.freeze", "1")):
            if (group / file).exists() and (group / file).read_text().strip() == word:
                return True
    return False


def test_what_they_share_agrees(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """Saved one after the other by GRIT's agent, thousands of turns apart were it not for the
    pod's pause; the number in the socket, in shared memory and in the file goes on."""
    one = pair(pod, **{"grit.dev_together": "true"}).run()
    goes_on(one)
    agent.checkpoint_pod(one, directory)
    goes_on(one)
    one.remove()
    again = pair(pod, **{"grit.dev_together": "true", "grit.dev_checkpoint": directory}).run()
    goes_on(again)


def test_saved_apart_they_do_not(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """The same without the pod's pause: what the test above would see."""
    one = pair(pod).run()
    goes_on(one)
    agent.checkpoint_pod(one, directory)
    one.remove()
    again = pair(pod, **{"grit.dev_checkpoint": directory}).run()
    gpu.until("a word", lambda: any("DISAGREE" in line for n in again.ids for line in again.log(n)))


def test_exit_of_one_harms_no_other(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    one = pair(pod, **{"grit.dev_together": "true"}).run()
    goes_on(one)
    agent.checkpoint_pod(one, directory, ["a"], exiting=["a"])
    gpu.until("its end", lambda: one.status("a").state == kubelets.EXITED)
    assert frozen(one, "b")
    agent.checkpoint_pod(one, directory, ["b"], exiting=["b"])
    gpu.until("its end", lambda: one.status("b").state == kubelets.EXITED)
    one.remove()
    again = pair(pod, **{"grit.dev_together": "true", "grit.dev_checkpoint": directory}).run()
    goes_on(again)


def test_all_wait_for_all(kubelet: Kubelet, pod: MakePod, directory: str, engine: str) -> None:
    """What the first Pause does, what clients see meanwhile, and when all are let go."""
    node, board = kubelet.node, kubelet.board
    assert board
    gpu.configure(node, engine=engine)
    one = pod("train", "main", "side", annotations=TOGETHER).run()
    before = {name: one.next_report(name) for name in one.ids}
    with agent.tasks_of(node) as tasks:
        tasks("Pause", container_id=one.ids["main"])
        assert frozen(one, "main") and frozen(one, "side")
        assert statuses(one) == {"main": "PAUSED", "side": "RUNNING"}
        if engine == "driver":  # CRIU's plugin takes the memory as it dumps
            assert board.owners() == {}
        tasks("Resume", container_id=one.ids["main"])  # no Checkpoint: all are let go
    assert not frozen(one, "main") and not frozen(one, "side")
    for name in one.ids:
        gpu.go_on(before[name], one.next_report(name))

    agent.checkpoint_pod(one, directory, ["main"])
    assert frozen(one, "main") and frozen(one, "side")
    assert statuses(one) == {"main": "RUNNING", "side": "RUNNING"}
    agent.checkpoint_pod(one, directory, ["side"])
    assert not frozen(one, "main") and not frozen(one, "side")
    for name in one.ids:
        gpu.go_on(before[name], one.next_report(name))
        pid = node.host_pid(one.task_pids()[name])
        assert board.library.state(pid) == (simgpu.SUCCESS, simgpu.RUNNING)


def test_no_one_is_frozen_before_the_last_gpu_is_free(
    kubelet: Kubelet, pod: MakePod, directory: str
) -> None:
    """A frozen container next to one that still works on its GPU would be at another instant."""
    node, board = kubelet.node, kubelet.board
    assert board
    gpu.configure(node, engine="driver")
    one = pod("train", "main", "side", annotations=TOGETHER).run()
    main, side = (node.host_pid(one.task_pids()[name]) for name in ("main", "side"))
    board.fault("speed=2000000", side)
    with agent.tasks_of(node) as tasks:
        word = {"container_id": one.ids["main"]}
        pausing = threading.Thread(target=tasks, args=("Pause",), kwargs=word)
        pausing.start()
        gpu.until("main's GPU is free", lambda: main not in board.owners())
        while True:
            too_early = frozen(one, "main")
            if side not in board.owners():
                break
            assert not too_early
        pausing.join(60)
        assert frozen(one, "main") and frozen(one, "side")
        board.end_faults()
        tasks("Resume", container_id=one.ids["main"])


def test_one_that_cannot_be_suspended(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """Then none is paused: all run on with their GPU, and the client is told which and why."""
    node, board = kubelet.node, kubelet.board
    assert board
    gpu.configure(node, lock_timeout=1)
    one = pod("train", "main", "side", annotations=TOGETHER).run()
    before = {name: one.next_report(name) for name in one.ids}
    side = one.task_pids()["side"]
    board.fault("lock=never", node.host_pid(side))
    told = f"pid {side} .*not locked within 1 s.*all containers of the pod run on"
    with agent.tasks_of(node) as tasks, pytest.raises(ServiceError, match=told):
        tasks("Pause", container_id=one.ids["main"])
    board.end_faults()
    for name, pid in one.task_pids().items():
        if name:
            gpu.go_on(before[name], one.next_report(name))
            assert board.library.state(node.host_pid(pid)) == (simgpu.SUCCESS, simgpu.RUNNING)
    agent.checkpoint_pod(one, directory)  # nothing stands in the way of another attempt


def test_a_client_that_loses_interest(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    gpu.configure(kubelet.node, together_timeout=0.5)
    one = pod("train", "main", "side", annotations=TOGETHER).run()
    before = {name: one.next_report(name) for name in one.ids}
    agent.checkpoint_pod(one, directory, ["main"])
    for name in one.ids:
        gpu.go_on(before[name], one.next_report(name))
    assert "nobody checkpoints the pod's other containers" in kubelet.node.containerd_log()


def test_a_wrong_word(kubelet: Kubelet, pod: MakePod) -> None:
    one = pod("wrong", {"main": ["/bin/true"]}, annotations={"grit.dev/together": "yes"})
    with pytest.raises(ServiceError, match='together is "yes"; it must be "true" or "false"'):
        one.run()
