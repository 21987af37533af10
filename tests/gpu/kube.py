"""A cluster on the machine with the GPU: the control plane of `tests.e2e.kube`, and for a node, the
machine itself or one that it plays, the agent, and the kubelet's part against its containerd."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tests.e2e.kube.control_plane import BINARIES, KUBECONFIG, ControlPlane
from tests.e2e.kube.control_plane import HOME as PLANE
from tests.e2e.pods.kubelet import EXITED, IMAGE, PAUSE, Kubelet, Pod
from tests.gpu import kube_kit, machine
from tests.gpu.job import Line, reports, until
from tests.gpu.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.nodes.node import Node

STATE = Path("/run/grit-gpu-kube")
EXAMPLES = machine.REPOSITORY / "packaging/kubernetes/examples"
CLAIM = "ckpt-store"
_OPENSSL = """\
[req]
distinguished_name = name
x509_extensions = authority
[name]
[authority]
basicConstraints = critical,CA:TRUE
subjectKeyIdentifier = hash
"""
_ENTRIES_OF_ETC = ("ld.so.cache", "alternatives", "passwd", "ssl")
"""What a job needs of /etc. In all of it there would be no place for the files of a pod."""


class HostPlane(ControlPlane):
    """Its parts run on the machine itself, which is theirs alone."""

    def __init__(self, host: Any) -> None:
        self.node = host
        self._processes = {}

    def __enter__(self) -> HostPlane:
        for directory in (PLANE, BINARIES):
            shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(kube_kit.HOME / "bin", BINARIES)
        os.environ["PATH"] += f":{BINARIES}"
        STATE.mkdir(exist_ok=True)
        (STATE / "openssl.cnf").write_text(_OPENSSL)
        os.environ["OPENSSL_CONF"] = str(STATE / "openssl.cnf")
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        Path(KUBECONFIG).parent.mkdir(parents=True, exist_ok=True)
        Path(KUBECONFIG).write_text(self.kubeconfig("agent", "127.0.0.1"))
        return self

    def __exit__(self, *error: object) -> None:
        for name in ("apiserver", "etcd", "authorizer"):
            if name in self._processes:
                self.stop(name)


@dataclass(frozen=True)
class Given:
    """What the containers of a node's pods are given beside their own. `devices` maps paths in the
    container to the machine's; `mounts` are CRI's."""

    devices: Mapping[str, str]
    environment: Mapping[str, str]
    mounts: Sequence[Mapping[str, Any]]


def given(host: Machine, devices: Sequence[str]) -> Given:
    """The machine's programs, Python and driver files, and these of its devices."""
    environment = machine.job_environment()
    return Given({path: path for path in devices}, environment, _mounts(host))


class HostPod(Pod):
    """A pod in the machine's network."""

    def __init__(self, *words: Any, given: Given, **options: Any) -> None:
        super().__init__(*words, **options)
        self._given = given
        del self._config["hostname"]  # with the network, the machine's
        context = self._config["linux"]["security_context"]
        context["namespace_options"]["network"] = 2

    def _container(self, name: str, attempt: int) -> dict[str, Any]:
        found = super()._container(name, attempt)
        found["mounts"] += self._given.mounts
        found["devices"] = [
            {"container_path": path, "host_path": of, "permissions": "rwm"}
            for path, of in self._given.devices.items()
        ]
        every = self._given.environment.items()
        found["envs"] += [{"key": key, "value": value} for key, value in every]
        context = found["linux"]["security_context"]
        context["namespace_options"]["network"] = 2
        # Or the driver's library makes itself the files of GPUs that it was not given.
        context["capabilities"] = {"drop_capabilities": ["MKNOD"]}
        return found


def _mounts(host: Machine) -> list[dict[str, Any]]:
    """The machine's trees as CRI mounts. CRI binds with all that is mounted below, but CRIU is to
    know each mount by itself: so it is given bindings of the trees that have nothing below."""
    trees = [tree for tree in machine.shared_trees() if tree != "/etc"]
    trees += [f"/etc/{name}" for name in _ENTRIES_OF_ETC]
    targets = [(tree, tree) for tree in trees if os.path.exists(tree)]
    targets += [(f"/usr/{path}", f"/{path}") for path in ("lib", "lib64")]
    return [
        {"container_path": to, "host_path": _alone(host, of), "readonly": True}
        for of, to in targets
    ]


def _alone(host: Machine, tree: str) -> str:
    place = str(STATE / "trees" / tree.strip("/").replace("/", "_"))
    seen = host.path(place)
    if not seen.exists():
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.mkdir() if os.path.isdir(tree) else seen.touch()
        host.run(["mount", "-o", "bind", tree, place])
    return place


def _let_go(host: Machine) -> None:
    for place in host.path(str(STATE / "trees")).glob("*"):
        host.run(["umount", "-l", str(STATE / "trees" / place.name)], check=False)
        # Nothing recursive: should it be mounted still, it is the machine's /usr.
        place.rmdir() if place.is_dir() else place.unlink()


@contextlib.contextmanager
def kubelet_on(host: Machine) -> Iterator[Kubelet]:
    _let_go(host)
    kubelet = Kubelet(cast("Node", host), socket=str(machine.SOCKET))
    assert kubelet.runs(), host.log()[-4000:]
    for one in kubelet.pods():  # of a run that was cut
        kubelet.cri("StopPodSandbox", pod_sandbox_id=one)
        kubelet.cri("RemovePodSandbox", pod_sandbox_id=one)
    kubelet.import_image(kube_kit.HOME / "pause.tar", PAUSE)
    kubelet.import_image(machine.KIT / "busybox.tar", IMAGE)
    try:
        yield kubelet
    finally:
        for pod in kubelet.made:
            pod.remove()
        kubelet.cri.close()
        _let_go(host)


@contextlib.contextmanager
def agent_on(host: Machine, store: Path, log: Path, name: str = "node-a") -> Iterator[None]:
    """`python -m shim.agent`, its claim CLAIM at `store`, until the end."""
    place = str(STATE / "agent.toml")
    settings = host.path(place)
    settings.parent.mkdir(exist_ok=True)
    settings.write_text(f'pod_wait_seconds = 3\n[stores]\n{CLAIM} = "{store}"\n')
    words = ["--config", place, "--node", name, "--kubeconfig", KUBECONFIG]
    words += ["--address", str(machine.SOCKET)]
    with open(log, "ab") as file:
        agent = host.popen([*_python(), "-m", "shim.agent", *words], stdout=file, stderr=file)
        try:
            yield
        finally:
            agent.terminate()
            agent.wait(30)


def gritctl(host: Machine, *words: str) -> str:
    call = "from shim.gritctl.cli import main; main()"
    return host.run([*_python(), "-c", call, *words], timeout=300).stdout


def _python() -> list[str]:
    """The shim's Python, which finds what the second kit has, too."""
    path = f"PYTHONPATH={kube_kit.PACKAGES}"
    return ["env", path, str(machine.ENVIRONMENT / "bin/python")]


def reported(file: Path, pod: Pod) -> Line:
    """The last of three reports that come from now on."""
    wanted = len(reports(file)) + 3

    def there() -> bool:
        return len(reports(file)) >= wanted or pod.status("main").state == EXITED

    until("reports of the workload", there, 90, every=0.05)
    found = reports(file)
    assert len(found) >= wanted, [f"{pod.name} has ended", *pod.log("main")[-20:]]
    return found[-1]


def workload(host_directory: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """A workload's command, and the mounts by which its container has the workloads in /job and
    reports there."""
    shutil.rmtree(host_directory, ignore_errors=True)
    shutil.copytree(Path(__file__).parent / "workloads", host_directory)
    return [sys.executable, "-u", f"/job/{words[0]}", *words[1:]], {"/job": str(host_directory)}
