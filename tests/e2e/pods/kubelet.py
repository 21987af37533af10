"""A kubelet's part, played on a node: pods made, watched and removed through the real CRI plugin
of the node's containerd, in the order and with the directories a kubelet uses.

    kubelet = Kubelet(node)
    pod = kubelet.pod("job", {"main": ["sh", "-c", "..."]}).run()
    pod.log("main"); pod.remove()
"""

from __future__ import annotations

import json
import shutil
import uuid
from typing import TYPE_CHECKING, Any

from tests.e2e import gpu
from tests.e2e.pods.services import ServiceError, Services
from tests.nodes.image import build_image, reference
from tests.nodes.installed import REPOSITORY, SHIM
from tests.nodes.node import SOCKET
from tests.simgpu.simgpu import reports

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import Report, SimGpu

IMAGE = gpu.IMAGE
PAUSE = reference("local/pause", "1")
PAUSE_COMMAND = ("/bin/sleep", "2147483647")
NAMESPACE = "k8s.io"
TASKS = f"/run/containerd/io.containerd.runtime.v2.task/{NAMESPACE}"
CREATED, RUNNING, EXITED = range(3)
"""A container's states (CRI)."""

HANDLERS = ("grit", "grit-inline", "grit-as-runc", "runc")
"""The runtime classes of a node that `configure` set up: by ConfigPath as packaged, with options
written into containerd's configuration, under runc's name by runtime_path, and the stock one."""

_RUNTIMES = """
[plugins."{cri}".containerd.runtimes.grit-inline]
  runtime_type = "io.containerd.grit.v1"
  pod_annotations = ["grit.dev/*"]
  container_annotations = ["grit.dev/*"]
  [plugins."{cri}".containerd.runtimes.grit-inline.options]
    BinaryName = "runc"
    [plugins."{cri}".containerd.runtimes.grit-inline.options.grit]
      on_missing_checkpoint = "fail"

[plugins."{cri}".containerd.runtimes.grit-as-runc]
  runtime_type = "io.containerd.runc.v2"
  runtime_path = "{shim}"
  pod_annotations = ["grit.dev/*"]
  container_annotations = ["grit.dev/*"]
"""

_CONFIG = {
    "v2": """\
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true  # for hosts that keep CAP_SYS_RESOURCE to themselves
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
""",
    "v3": """\
version = 3
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{pause}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dir = "/usr/lib/cni"
""",
}
_CRI_PLUGIN = {"v2": "io.containerd.grpc.v1.cri", "v3": "io.containerd.cri.v1.runtime"}


def configure(node: Node, *, subnet: int = 1, runtimes: bool = True) -> str:
    """Gives the node a pod network and the runtime classes, as packaged and the tests' own;
    returns containerd's configuration, for `Node.start_containerd`."""
    version = "v3" if node.containerd_version >= (2, 0) else "v2"
    network = {
        "cniVersion": "0.4.0",
        "name": "pods",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "subnet": f"10.88.{subnet}.0/24",
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            }
        ],
    }
    _write(node, "/etc/cni/net.d/10-pods.conflist", json.dumps(network))
    cri = _CRI_PLUGIN[version]
    config = _CONFIG[version].format(pause=PAUSE)
    if runtimes:
        packaged = (REPOSITORY / f"packaging/containerd/config-{version}.toml").read_text()
        config += packaged[packaged.index("[plugins") :] + _RUNTIMES.format(cri=cri, shim=SHIM)
        _write(node, gpu.CONFIG, "")
    return config


def _write(node: Node, path: str, text: str) -> None:
    node.path(path).parent.mkdir(parents=True, exist_ok=True)
    node.path(path).write_text(text)


class Kubelet:
    """The kubelet of one node; `board` are the GPUs its pods get, if any."""

    def __init__(self, node: Node, board: SimGpu | None = None, socket: str = SOCKET) -> None:
        self.node = node
        self.board = board
        self.cri = Services(node.path(socket), "cri.proto")
        self.made: list[Pod] = []
        """Every pod that was not removed yet, or was."""

    def pod(self, name: str, containers: Mapping[str, Sequence[str]], **options: Any) -> Pod:
        return Pod(self, name, containers, **options)

    def gpu_pod(self, name: str, *names: str, words: Sequence[str] = (), **options: Any) -> Pod:
        """A pod of GPU workloads, one container for each of `names`."""
        command = [gpu.WORKLOAD, "--tick-ms", "10", "--status", gpu.STATUS]
        command += ["--token-file", "/token", *words]
        return Pod(self, name, dict.fromkeys(names or ("main",), command), gpu=True, **options)

    def runs(self) -> bool:
        """Whether containerd took its CRI plugin into service."""
        try:
            return bool(self.cri("Version").runtime_name)
        except ServiceError:
            return False

    def import_images(self) -> None:
        """The images that pods are made of."""
        self.import_image(build_image("local/pause", "1", {}, command=PAUSE_COMMAND), PAUSE)
        self.import_image(build_image("local/busybox", "1", {}), IMAGE)

    def import_image(self, tar: Path, reference: str) -> None:
        """Brings an image as a pull does: known to CRI, by its name and by its id."""
        self.node.import_image(tar, namespace=NAMESPACE)
        identity = gpu.until("the image", lambda: self._image(reference))
        self.node.ctr("-n", NAMESPACE, "image", "tag", "--force", reference, identity)

    def _image(self, reference: str) -> str:
        images = self.cri("ListImages").images
        return next((str(image.id) for image in images if reference in image.repo_tags), "")

    def pods(self) -> list[str]:
        return [item.id for item in self.cri("ListPodSandbox").items]


class Pod:
    """One pod. `containers` maps names to commands. `annotations` are the pod's, which a kubelet
    sends with the sandbox; `of_containers` those of each container. `volumes` maps names of empty
    directories to where every container sees them."""

    def __init__(
        self,
        kubelet: Kubelet,
        name: str,
        containers: Mapping[str, Sequence[str]],
        *,
        handler: str = "grit",
        annotations: Mapping[str, str] | None = None,
        of_containers: Mapping[str, Mapping[str, str]] | None = None,
        gpu: bool = False,
        volumes: Mapping[str, str] | None = None,
        image: str = IMAGE,
        mounts: Mapping[str, str] | None = None,
        uid: str = "",
        env: Mapping[str, str] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        kubelet.made.append(self)
        self.kubelet = kubelet
        self.node = kubelet.node
        self.name = name
        self.commands = dict(containers)
        self.handler = handler
        self.of_containers = dict(of_containers or {})
        self.gpu = gpu
        self.image = image
        self.uid = uid or str(uuid.uuid4())
        self.volumes = dict(volumes or {})
        self.mounts = dict(mounts or {})
        self.env = dict(env or {})
        self.ids: dict[str, str] = {}
        self.attempts: dict[str, int] = {}
        self.sandbox = ""
        self.logs = f"/var/log/pods/default_{name}_{self.uid}"
        self._config = {
            "metadata": {"name": name, "uid": self.uid, "namespace": "default"},
            "hostname": name,
            "log_directory": self.logs,
            "labels": {
                **(labels or {}),
                "io.kubernetes.pod.name": name,
                "io.kubernetes.pod.namespace": "default",
                "io.kubernetes.pod.uid": self.uid,
            },
            "annotations": dict(annotations or {}),
            "linux": {
                "cgroup_parent": f"/kubepods/pod{self.uid}",
                # a process tree for each container, one network and one IPC for the pod
                "security_context": {"namespace_options": {"pid": 1}},
            },
        }

    # --- life -----------------------------------------------------------------------------

    def run(self) -> Pod:
        """Sandbox and containers, all started."""
        self.run_sandbox()
        for name in self.commands:
            self.create(name)
            self.start(name)
        return self

    def run_sandbox(self) -> Pod:
        self.node.path(self.logs).mkdir(parents=True, exist_ok=True)
        reply = self._cri("RunPodSandbox", config=self._config, runtime_handler=self.handler)
        self.sandbox = reply.pod_sandbox_id
        return self

    def create(self, name: str) -> str:
        """A new container `name`; each is one attempt more, with a log of its own."""
        attempt = self.attempts[name] = self.attempts.get(name, -1) + 1
        self.node.path(f"{self.logs}/{name}").mkdir(exist_ok=True)
        self.ids[name] = self._cri(
            "CreateContainer",
            pod_sandbox_id=self.sandbox,
            config=self._container(name, attempt),
            sandbox_config=self._config,
        ).container_id
        return self.ids[name]

    def start(self, name: str) -> None:
        self._cri("StartContainer", container_id=self.ids[name])

    def stop(self, name: str, timeout: int = 0) -> None:
        self._cri("StopContainer", container_id=self.ids[name], timeout=timeout)

    def remove(self) -> None:
        """All of it; what is gone already is no error."""
        if not self.sandbox:
            return
        self._cri("StopPodSandbox", pod_sandbox_id=self.sandbox)
        self._cri("RemovePodSandbox", pod_sandbox_id=self.sandbox)
        self.sandbox = ""
        shutil.rmtree(self.node.path(self.logs), ignore_errors=True)
        shutil.rmtree(self.node.path(self._home()), ignore_errors=True)
        for root in self.node.cgroup_roots():
            group = root / f"kubepods/pod{self.uid}"
            if group.exists():
                group.rmdir()

    # --- what it is -----------------------------------------------------------------------

    def status(self, name: str) -> Any:
        return self._cri("ContainerStatus", container_id=self.ids[name]).status

    def ip(self) -> str:
        status = self._cri("PodSandboxStatus", pod_sandbox_id=self.sandbox).status
        return str(status.network.ip)

    def sandbox_state(self) -> int:
        """0 ready, 1 not ready."""
        status = self._cri("PodSandboxStatus", pod_sandbox_id=self.sandbox).status
        return int(status.state)

    def shell(self, name: str, script: str) -> str:
        """What `sh -c` prints in the container, as by an exec probe."""
        reply = self._cri(
            "ExecSync", container_id=self.ids[name], cmd=["/bin/sh", "-c", script], timeout=60
        )
        assert reply.exit_code == 0, reply
        return bytes(reply.stdout).decode()

    def log(self, name: str) -> list[str]:
        """The lines of the container's log, without CRI's stamp."""
        path = self.node.path(self.log_path(name))
        if not path.exists():
            return []
        return [line.split(" ", 3)[3] for line in path.read_text().splitlines()]

    def log_path(self, name: str) -> str:
        return f"{self.logs}/{name}/{self.attempts[name]}.log"

    def task_pids(self) -> dict[str, int]:
        """Each task's pid in the node, the sandbox's under "": what `ctr task ls` says."""
        lines = self.node.ctr("-n", NAMESPACE, "task", "ls").stdout.splitlines()[1:]
        found = {words[0]: int(words[1]) for words in map(str.split, lines)}
        known = {"": self.sandbox, **self.ids}
        return {name: found[identity] for name, identity in known.items() if identity in found}

    def shim_answers(self) -> bool:
        """Whether the pod's shim tells of the sandbox."""
        done = self.node.ctr("-n", NAMESPACE, "task", "metrics", self.sandbox, check=False)
        return done.returncode == 0

    def rootfs(self, name: str) -> Path:
        return self.node.path(f"{TASKS}/{self.ids[name]}/rootfs")

    def spec(self, name: str) -> Any:
        """The OCI specification that the shim was given; the sandbox's for ""."""
        identity = self.ids[name] if name else self.sandbox
        return json.loads(self.node.path(f"{TASKS}/{identity}/config.json").read_text())

    def reports(self, name: str = "main") -> list[Report]:
        return reports(self.rootfs(name) / gpu.STATUS.lstrip("/"))

    def next_report(self, name: str = "main") -> Report:
        """One that was begun and ended after this call."""
        before = len(self.reports(name))
        gpu.until(f"report of {self.name}", lambda: len(self.reports(name)) >= before + 2)
        last = self.reports(name)[-1]
        assert last.ok, last
        return last

    def volume(self, name: str) -> Path:
        """An empty directory of the pod, as the host sees it."""
        return self.node.path(f"{self._home()}/volumes/kubernetes.io~empty-dir/{name}")

    # --- requests -------------------------------------------------------------------------

    def _cri(self, method: str, **fields: Any) -> Any:
        return self.kubelet.cri(method, **fields)

    def _home(self) -> str:
        return f"/var/lib/kubelet/pods/{self.uid}"

    def _container(self, name: str, attempt: int) -> dict[str, Any]:
        env = dict(self.env)
        mounts = [{"container_path": to, "host_path": of} for to, of in self.mounts.items()]
        devices = []
        for volume, where in self.volumes.items():
            self.volume(volume).mkdir(parents=True, exist_ok=True)
            of = f"{self._home()}/volumes/kubernetes.io~empty-dir/{volume}"
            mounts.append({"container_path": where, "host_path": of})
        board = self.kubelet.board
        if self.gpu and board:
            env |= dict(entry.split("=", 1) for entry in board.container_env())
            for mount in board.container_mounts():
                readonly = "ro" in mount["options"]
                of, to = mount["source"], mount["destination"]
                mounts.append({"container_path": to, "host_path": of, "readonly": readonly})
            for number in range(board.gpus):
                path = f"/dev/nvidia{number}"
                device = {"container_path": path, "host_path": path, "permissions": "rwm"}
                devices.append(device)
        return {
            "metadata": {"name": name, "attempt": attempt},
            "image": {"image": self.image},
            "command": list(self.commands[name]),
            "envs": [{"key": key, "value": value} for key, value in env.items()],
            "mounts": mounts,
            "devices": devices,
            "labels": {**self._config["labels"], "io.kubernetes.container.name": name},
            "annotations": dict(self.of_containers.get(name, {})),
            "log_path": f"{name}/{attempt}.log",
            "linux": {"security_context": {"namespace_options": {"pid": 1}}},
        }
