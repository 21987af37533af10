"""What two containers of one pod have between them that neither can be saved with."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.pods import agent
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.services import ServiceError
from tests.nodes import cache
from tests.nodes.image import build_image, reference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.pods.kubelet import Kubelet, Pod

    MakePod = Callable[..., Pod]

IMAGE = reference("local/peers", "1")
PROGRAMS = ("peers", "talk")


@pytest.fixture(scope="session")
def peers_image() -> Path:
    """Both programs, in an image."""
    sources = [Path(__file__).with_name(f"{name}.c") for name in PROGRAMS]
    digest = cache.digest(*(source.read_text() for source in sources))

    def make(draft: Path) -> None:
        for source in sources:
            words = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", str(draft / source.stem)]
            subprocess.run([*words, str(source)], check=True)

    folder = cache.entry(cache.directory() / "peers" / digest, make)
    return build_image("local/peers", "1", {f"/{name}": folder / name for name in PROGRAMS})


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


@pytest.mark.parametrize("kubelet", ["forky"], indirect=True)  # CRIU 4.1 dumps no socket here
def test_tcp(kubelet: Kubelet, pod: MakePod, directory: str) -> None:
    """A connection between the two goes on, though one is restored after the other; where the
    other does not come, that is told. Nothing stays in the pod's network."""
    gpu.configure(kubelet.node, tcp="established")
    commands = {"a": ["/talk", "listen", "4000"], "b": ["/talk", "connect", "4000"]}
    notes = {"grit.dev/together": "true"}
    one = pod("talk", commands, image=IMAGE, annotations=notes).run()
    for name in one.ids:
        goes_on(one, name)
    agent.checkpoint_pod(one, directory)
    for name in one.ids:
        goes_on(one, name)
    end(one)

    notes["grit.dev/checkpoint"] = directory
    again = pod("talk", commands, image=IMAGE, annotations=notes).run_sandbox()
    again.create("a")
    again.start("a")
    assert "-d 127.0.0.1/32" in rules(again)
    again.create("b")
    again.start("b")
    for name in again.ids:
        goes_on(again, name)
        assert not [line for line in again.log(name) if "LOST" in line]
    assert "-j" not in rules(again)
    end(again)

    gpu.configure(kubelet.node, tcp="established", together_timeout=0.5)
    alone = pod("talk", commands, image=IMAGE, annotations=notes).run_sandbox()
    alone.create("b")
    alone.start("b")
    gpu.until("a word", lambda: "was not restored in time" in kubelet.node.containerd_log())
    gpu.until("no rule", lambda: "-j" not in rules(alone))


def end(pod: Pod) -> None:
    """Both end as one is stopped. containerd 2.1 says "ttrpc: closed" of a container that ends by
    itself while it is being stopped."""
    pod.stop("a")
    gpu.until("the end", lambda: pod.status("b").state == kubelets.EXITED)
    pod.remove()


def rules(pod: Pod) -> str:
    """The packet filter of the pod."""
    network = f"--net=/proc/{pod.task_pids()['']}/ns/net"
    return pod.node.run(["nsenter", network, "iptables", "-S"]).stdout


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
