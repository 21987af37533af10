"""A control plane of real parts on a node of its own: etcd, the API server for custom resources,
kubectl, and the network by which other nodes reach it.

    with ControlPlane() as plane:
        plane.apply(manifest)
        path = plane.join(node)   # a kubeconfig in the node

The server knows no core resources, so nothing says whether a namespace exists. Whoever has a
certificate of `system:masters` may do everything, the agents what the packaged ClusterRole lets
them (`authorizer.py`); what was done is in the audit log.
"""

from __future__ import annotations

import base64
import json
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tests.e2e import gpu
from tests.nodes import apiserver
from tests.nodes.installed import REPOSITORY
from tests.nodes.node import Node

if TYPE_CHECKING:
    from types import TracebackType

    from tests.nodes.node import Process

BINARIES = "/usr/local/lib/kube"
HOME = "/var/lib/kube"
ADDRESS = "10.99.0.1"
PORT = 6443
AUTHORIZER_PORT = 6444
AGENT = "system:serviceaccount:kube-system:grit-agent"
"""Who the agents are."""
KUBECONFIG = "/etc/kubernetes/grit-agent.conf"
"""Where a node that joined has its kubeconfig."""

# One certificate for the server and for its clients.
_CERTIFICATES = f"""\
set -eu
mkdir -p {HOME} && cd {HOME}
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=tests-ca \\
    -addext keyUsage=critical,keyCertSign,cRLSign \\
    -keyout ca.key -out ca.crt
sign() {{
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "$2" \\
        -keyout $1.key -out $1.csr
    printf '%s\\n' "$3" > $1.ext
    openssl x509 -req -in $1.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out $1.crt \\
        -extfile $1.ext
}}
sign server /CN=apiserver 'subjectAltName=IP:{ADDRESS},IP:127.0.0.1'
sign admin /O=system:masters/CN=admin extendedKeyUsage=clientAuth
sign agent /O=system:serviceaccounts/CN={AGENT} extendedKeyUsage=clientAuth
"""

_AUDIT = """\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Metadata
"""

# All that asks core resources, which are not there, is off.
_SERVER = (
    "--etcd-servers=http://127.0.0.1:2379",
    f"--secure-port={PORT}",
    f"--tls-cert-file={HOME}/server.crt",
    f"--tls-private-key-file={HOME}/server.key",
    f"--client-ca-file={HOME}/ca.crt",
    f"--kubeconfig={HOME}/admin.conf",
    f"--authentication-kubeconfig={HOME}/admin.conf",
    f"--authorization-kubeconfig={HOME}/authorizer.conf",
    "--authentication-skip-lookup",
    "--enable-priority-and-fairness=false",
    "--disable-admission-plugins=NamespaceLifecycle,MutatingAdmissionPolicy,"
    "MutatingAdmissionWebhook,ValidatingAdmissionPolicy,ValidatingAdmissionWebhook",
    f"--audit-policy-file={HOME}/audit.yaml",
    f"--audit-log-path={HOME}/audit.log",
)


class ControlPlane:
    """etcd and the API server, started; all of it is gone with the node."""

    def __init__(self) -> None:
        self.node = Node(apiserver.NODE, binds={BINARIES: apiserver.directory()})
        self._processes: dict[str, Process] = {}
        self._joined = 0

    def __enter__(self) -> ControlPlane:
        self.node.start()
        try:
            self.node.run(["ip", "link", "add", "kube0", "type", "bridge"])
            self.node.run(["ip", "addr", "add", f"{ADDRESS}/24", "dev", "kube0"])
            self.node.run(["ip", "link", "set", "kube0", "up"])
            self.start()
        except BaseException:
            self.node.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.node.close()

    def start(self) -> None:
        """All its parts, on a node that stands."""
        self.node.run(["sh", "-c", _CERTIFICATES])
        self._write("audit.yaml", _AUDIT)
        self._write("admin.conf", self.kubeconfig("admin", "127.0.0.1"))
        self._start_authorizer()
        self.start_etcd()
        self.start_server()

    # --- its parts ------------------------------------------------------------------------

    def start_etcd(self) -> None:
        self._start("etcd", "--data-dir", f"{HOME}/etcd", "--unsafe-no-fsync")

    def start_server(self) -> None:
        """Starts the API server; returns when it says that it is ready."""
        self._start("apiserver", *_SERVER)
        gpu.until("a ready API server", self._ready, 60)

    def _start_authorizer(self) -> None:
        script = Path(__file__).with_name("authorizer.py").read_text()
        self._write("authorizer.py", script)
        self._write("authorizer.conf", _kubeconfig(f"http://127.0.0.1:{AUTHORIZER_PORT}", {}, {}))
        words = ["python3", f"{HOME}/authorizer.py", str(AUTHORIZER_PORT)]
        server = self.node.popen(words, stdin=subprocess.PIPE)
        assert server.stdin
        server.stdin.write(json.dumps({AGENT: granted()}))
        server.stdin.close()
        self._processes["authorizer"] = server

    def stop(self, name: str) -> None:
        """Ends "etcd" or "apiserver" (SIGKILL)."""
        process = self._processes.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(30)

    def _start(self, name: str, *words: str) -> None:
        with open(self.node.path(f"/var/log/{name}.log"), "ab") as log:
            self._processes[name] = self.node.popen(
                [f"{BINARIES}/{name}", *words],
                cwd="/var/lib",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _ready(self) -> bool:
        process = self._processes["apiserver"]
        assert process.poll() is None, self.log("apiserver")
        # Its informers wait for core services, which it will never hear of.
        asked = self.kubectl("get", "--raw", "/readyz?exclude=informer-sync", check=False)
        return asked.returncode == 0

    def log(self, name: str) -> str:
        return self.node.path(f"/var/log/{name}.log").read_text(errors="replace")[-6000:]

    # --- its users ------------------------------------------------------------------------

    def kubectl(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`kubectl ...` as the cluster's administrator; options are those of `Node.run`."""
        return self.node.run(self.command(*words), **options)

    def apply(self, manifest: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """`kubectl apply` of a manifest. It must not validate by itself: this server publishes no
        OpenAPI for it to do so; the server's own validation is another thing."""
        words = ("apply", "--validate=false", "-f", "-")
        return self.kubectl(*words, input=manifest, **options)

    def apply_packaged(self) -> None:
        """The resources, as packaged; returns when the server has taken them into service."""
        for path in sorted((REPOSITORY / "packaging/kubernetes/crds").glob("*.yaml")):
            self.apply(path.read_text())
        for name in ("checkpoints", "restores"):
            self.kubectl("wait", "--for=condition=Established", f"crd/{name}.kaito.sh")

    def command(self, *words: str) -> list[str]:
        return [f"{BINARIES}/kubectl", f"--kubeconfig={HOME}/admin.conf", *words]

    def get(self, *words: str) -> Any:
        """`kubectl get ... -o json`, read."""
        return json.loads(self.kubectl("get", *words, "-o", "json").stdout)

    def kubeconfig(self, user: str, address: str) -> str:
        """A kubeconfig that holds all it needs."""
        credentials = {
            "client-certificate-data": self._encoded(f"{user}.crt"),
            "client-key-data": self._encoded(f"{user}.key"),
        }
        authority = {"certificate-authority-data": self._encoded("ca.crt")}
        return _kubeconfig(f"https://{address}:{PORT}", authority, credentials)

    def join(self, node: Node) -> str:
        """Connects a node to the control plane; returns where the agent's kubeconfig is there."""
        self._joined += 1
        # From one network namespace to the other: this host's own never sees the pair.
        port = f"node{self._joined}"
        add = ["ip", "link", "add", port, "master", "kube0", "type", "veth"]
        words = [*add, "peer", "name", "kube", "netns", str(node.pid)]
        enter = ["nsenter", f"--net=/proc/{self.node.pid}/ns/net", "--"]
        subprocess.run([*enter, *words], check=True)
        self.node.run(["ip", "link", "set", port, "up"])
        node.run(["ip", "addr", "add", f"10.99.0.{self._joined + 1}/24", "dev", "kube"])
        node.run(["ip", "link", "set", "kube", "up"])
        path = node.path(KUBECONFIG)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.kubeconfig("agent", ADDRESS))
        return KUBECONFIG

    def audit(self, user: str = AGENT) -> list[dict[str, Any]]:
        """What `user` (the common name of its certificate) asked, in the API server's own words."""
        lines = self.node.path(f"{HOME}/audit.log").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["user"]["username"] == user]

    def _encoded(self, name: str) -> str:
        return base64.b64encode(self.node.path(f"{HOME}/{name}").read_bytes()).decode()

    def _write(self, name: str, text: str) -> None:
        self.node.path(f"{HOME}/{name}").write_text(text)


def granted() -> list[dict[str, Any]]:
    """The rules of the agents' ClusterRole, as packaged and bound."""
    path = REPOSITORY / "packaging/kubernetes/agent.yaml"
    every = list(yaml.safe_load_all(path.read_text()))
    (binding,) = [one for one in every if one["kind"] == "ClusterRoleBinding"]
    (subject,) = binding["subjects"]
    words = ("system", subject["kind"].lower(), subject["namespace"], subject["name"])
    assert ":".join(words) == AGENT
    roles = {one["metadata"]["name"]: one["rules"] for one in every if one["kind"] == "ClusterRole"}
    rules: list[dict[str, Any]] = roles[binding["roleRef"]["name"]]
    return rules


def _kubeconfig(server: str, cluster: dict[str, str], user: dict[str, str]) -> str:
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "tests", "cluster": {"server": server, **cluster}}],
            "users": [{"name": "tests", "user": user}],
            "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests"}}],
            "current-context": "tests",
        }
    )
