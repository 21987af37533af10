"""`kubectl apply -k packaging/kubernetes`, as far as kubectl itself can tell: the base holds every
manifest that lies there, and the documented overlay gives images another registry and the agent a
store."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING, Any

import yaml

from shim import __version__
from shim.agent import settings
from tests.nodes.installed import REPOSITORY

if TYPE_CHECKING:
    from tests.e2e.kube.control_plane import ControlPlane

PACKAGED = REPOSITORY / "packaging/kubernetes"
DOCUMENTED = re.compile(
    r"^```yaml\n(# overlay/kustomization\.yaml\n.*?)^```$", re.DOTALL | re.MULTILINE
)
(OVERLAY,) = DOCUMENTED.findall((REPOSITORY / "docs/kubernetes.md").read_text())
HOOKED = f"{OVERLAY}components: [../kubernetes/webhook]\n"


def test_the_base_and_an_overlay(plane: ControlPlane) -> None:
    node = plane.node
    shutil.copytree(PACKAGED, node.path("/root/kubernetes"))
    node.path("/root/overlay").mkdir()
    node.path("/root/overlay/kustomization.yaml").write_text(OVERLAY)

    def built(directory: str) -> list[Any]:
        return list(yaml.safe_load_all(plane.kubectl("kustomize", directory).stdout))

    apart = ("examples", "webhook")
    files = {path for path in PACKAGED.rglob("*.yaml") if path.parent.name not in apart}
    files -= {PACKAGED / "kustomization.yaml"}
    written = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    base = built("/root/kubernetes")
    assert sorted(base, key=str) == sorted(written, key=str)

    renamed = {f"registry.example/grit/{name}:{__version__}" for name in ("agent", "installer")}
    overlay = built("/root/overlay")
    assert images_of(overlay) == renamed
    assert "grit-webhook" not in str(overlay)
    (config,) = [one for one in overlay if one["kind"] == "ConfigMap"]
    node.path("/root/agent.toml").write_text(config["data"]["agent.toml"])
    found = settings.load(str(node.path("/root/agent.toml")), "node-1")
    assert found.stores == {"shared": "/mnt/shared"}
    (agent,) = [one for one in overlay if one["metadata"]["name"] == "grit-agent" and _runs(one)]
    spec = agent["spec"]["template"]["spec"]
    mounts = {one["name"]: one["mountPath"] for one in spec["containers"][0]["volumeMounts"]}
    volumes = {one["name"]: one for one in spec["volumes"]}
    assert (mounts["config"], mounts["shared"]) == ("/etc/grit", "/mnt/shared")
    assert volumes["config"]["configMap"]["name"] == config["metadata"]["name"]

    node.path("/root/overlay/kustomization.yaml").write_text(HOOKED)
    hooked = built("/root/overlay")
    assert images_of(hooked) == renamed
    (configuration,) = [one for one in hooked if one["kind"] == "MutatingWebhookConfiguration"]
    (hook,) = configuration["webhooks"]
    assert hook["failurePolicy"] == "Ignore"
    names = {one["metadata"]["name"] for one in hooked if one["kind"] == "Service"}
    assert names == {hook["clientConfig"]["service"]["name"]}


def images_of(manifests: list[Any]) -> set[str]:
    return {
        container["image"]
        for one in manifests
        if _runs(one)
        for container in one["spec"]["template"]["spec"]["containers"]
    }


def _runs(one: Any) -> bool:
    return one["kind"] in ("DaemonSet", "Deployment")
