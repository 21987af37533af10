"""docs/kubernetes.md, every command run as written.

Played by the test: kubectl, whose words reach a kubelet's part on the node; systemd, which restarts
containerd; the container image, in whose place the workload of the simulated GPU runs.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import threading
from typing import TYPE_CHECKING, Any

import yaml

from tests.e2e import gpu
from tests.e2e.pods import kubelet as kubelets
from tests.e2e.pods.conftest import CGROUP
from tests.e2e.pods.kubelet import Kubelet
from tests.nodes.installed import REPOSITORY
from tests.nodes.node import CONFIG, Node

if TYPE_CHECKING:
    from tests.e2e.pods.kubelet import Pod

DOCUMENT = REPOSITORY / "docs/kubernetes.md"
SOCKET = "/run/kubectl.sock"
KUBECTL = f"""\
#!/usr/bin/python3
import json, socket, sys

with socket.socket(socket.AF_UNIX) as s:
    s.connect("{SOCKET}")
    s.sendall(json.dumps(sys.argv[1:]).encode())
    s.shutdown(socket.SHUT_WR)
    answer = json.loads(b"".join(iter(lambda: s.recv(65536), b"")))
print(answer["said"])
sys.exit(answer["status"])
"""


class Cluster:
    """What kubectl asks for, done on one node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.kubelet: Kubelet | None = None
        self.handlers: dict[str, str] = {}
        self.pods: dict[str, Pod] = {}
        node.path("/usr/bin/kubectl").write_text(KUBECTL)
        node.path("/usr/bin/kubectl").chmod(0o755)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(node.path(SOCKET)))
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                words = json.loads(b"".join(iter(lambda: connection.recv(65536), b"")))  # noqa: B023
                try:
                    answer = {"said": self._do(*words), "status": 0}
                except Exception as error:
                    answer = {"said": repr(error), "status": 1}
                connection.sendall(json.dumps(answer).encode())

    def _do(self, action: str, *words: str) -> str:
        if action == "label":
            return f"node/{words[1]} labeled"
        if action == "apply":
            path = words[1] if words[1].startswith("/") else f"/root/{words[1]}"
            return self._apply(yaml.safe_load(self.node.path(path).read_text()))
        name = words[-1] if action != "wait" else words[1].removeprefix("pod/")
        one = self.pods[name]
        if action == "delete":
            one.remove()
            del self.pods[name]
        elif action == "wait":
            assert all(one.status(n).state == kubelets.RUNNING for n in one.ids)
        elif action == "logs":
            return "\n".join(one.log("main"))
        else:
            raise ValueError(action)
        return f"pod {name}"

    def _apply(self, manifest: dict[str, Any]) -> str:
        meta = manifest["metadata"]
        if manifest["kind"] == "RuntimeClass":
            self.handlers[meta["name"]] = manifest["handler"]
            return "created"
        assert self.kubelet
        spec = manifest["spec"]
        names = [one["name"] for one in spec["containers"]]
        assert all(one["resources"]["limits"]["nvidia.com/gpu"] == 1 for one in spec["containers"])
        handler = self.handlers[spec["runtimeClassName"]]
        notes = meta.get("annotations", {})
        one = self.kubelet.gpu_pod(meta["name"], *names, handler=handler, annotations=notes)
        self.pods[meta["name"]] = one.run()
        return "created"

    def close(self) -> None:
        self._server.close()


def test_every_command() -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
    build, install, *between, uninstall = blocks
    subprocess.run(["sh", "-ec", build], cwd=REPOSITORY, check=True)
    with Node("forky", cgroup=CGROUP, binds=gpu.kit_binds()) as node:
        shutil.copy(next((REPOSITORY / "dist").glob("*.deb")), node.path("/root"))
        node.path(CONFIG).write_text(old := kubelets.configure(node, runtimes=False))
        cluster = Cluster(node)
        node.start_containerd(env=gpu.NO_GPU_CHECK)
        run(node, install)
        node.stop_containerd()  # systemd's part
        node.start_containerd(env=gpu.NO_GPU_CHECK)
        cluster.kubelet = kubelet = Kubelet(node, gpu.gpu_of(node))
        kubelet.import_images()
        reports = []
        for block in between:
            run(node, block)
            if "train" in cluster.pods:
                reports.append(cluster.pods["train"].next_report())
        assert len(reports) == 3  # started, checkpointed, restored
        for before, after in itertools.pairwise(reports):
            gpu.go_on(before, after)
        counts = [report.counter for report in cluster.pods["train"].reports()]
        assert counts == list(range(len(counts)))  # the restored one did not begin anew
        cluster.pods["train"].remove()
        run(node, uninstall)
        assert node.path(CONFIG).read_text() == old
        cluster.close()
        kubelet.cri.close()


def run(node: Node, script: str) -> None:
    node.run(["bash", "-euo", "pipefail", "-c", script], cwd="/root", timeout=120)
