"""What two containers of one pod have between them that neither can be saved with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods.services import ServiceError
from tests.nodes import cache
from tests.nodes.image import build_image, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    MakePod = Callable[..., Pod]

IMAGE = reference("local/peers", "1")


@pytest.fixture(scope="session")
def peers_image() -> Path:
    """The peers program, in an image."""
    source = Path(__file__).with_name("peers.c")
    place = cache.directory() / "peers" / cache.digest(source.read_text())

    def make(draft: Path) -> None:
        words = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", str(draft / "peers")]
        subprocess.run([*words, str(source)], check=True)

    return build_image("local/peers", "1", {"/peers": cache.entry(place, make) / "peers"})


@pytest.fixture
def directory(kubelet: Kubelet, peers_image: Path) -> Iterator[str]:
    kubelet.import_image(peers_image, IMAGE)
    place = "/var/lib/grit/default/peers"
    yield place
    kubelet.node.run(["rm", "-rf", place])
    kubelet.node.path(gpu.CONFIG).write_text("")


@pytest.mark.parametrize("kubelet", ["13"], indirect=True)
def test_what_cannot_be_saved(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """It is refused with the reason, whichever container is asked for first, nothing is left of
    the attempt, and both run on as they were."""
    sysv = pod("sysv", {name: ["/peers", "sysv"] for name in "ab"}, image=IMAGE).run()
    until_ready(sysv)
    pids = sysv.task_pids()
    for name, other in ("ab", "ba"):
        told = (
            rf"pid {pids[name]} \(peers\) shares the SysV memory segment with key 0x67726974 with "
            rf"pid {pids[other]} \(peers\) outside the container.*nothing was written"
        )
        refused(sysv, name, directory, told)
    sysv.remove()

    gpu.configure(kubelet.node, ext_unix_sockets=True)
    path = "/shared/socket"
    commands = {"a": ["/peers", "listen", path], "b": ["/peers", "connect", path]}
    unix = pod("unix", commands, image=IMAGE, volumes={"shared": "/shared"}).run()
    until_ready(unix)
    for name in unix.ids:
        refused(unix, name, directory, "a unix stream socket is connected to a process outside")


@pytest.mark.parametrize("kubelet", ["13"], indirect=True)
def test_segments_of_one_container(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """They come back with it. CRIU makes all of a pod's with each container: the next is told."""
    commands = {"a": ["/peers", "sysv"], "b": ["/bin/sleep", "1000"]}
    one = pod("one", commands, image=IMAGE).run()
    gpu.until("the segment", lambda: "ready" in one.log("a"))
    agent.checkpoint_pod(one, directory)
    one.remove()
    notes = {"grit.dev/checkpoint": directory}
    again = pod("one", commands, image=IMAGE, annotations=notes).run_sandbox()
    again.create("a")
    again.start("a")
    goes_on(again, "a")
    again.create("b")
    with pytest.raises(ServiceError, match="the pod has these SysV objects already"):
        again.start("b")
    goes_on(again, "a")


def until_ready(pod: Pod) -> None:
    gpu.until("what they share", lambda: all("ready" in pod.log(name) for name in pod.ids))


def refused(pod: Pod, name: str, directory: str, told: str) -> None:
    with pytest.raises(ServiceError, match=told):
        agent.checkpoint_pod(pod, directory, [name])
    assert not pod.node.path(f"{directory}/{name}-work/checkpoint").exists()
    pod.node.run(["rm", "-rf", directory])
    for one in pod.ids:
        goes_on(pod, one)


def goes_on(pod: Pod, name: str) -> None:
    before = len(pod.log(name))
    gpu.until("a line", lambda: len(pod.log(name)) > before + 1)
