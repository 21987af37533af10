"""`kubectl apply -k packaging/kubernetes`, as far as kubectl itself can tell: the base holds every
manifest that lies there, and an overlay gives the image another registry."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import yaml

from shim import __version__
from tests.nodes.installed import REPOSITORY

if TYPE_CHECKING:
    from tests.e2e.kube.control_plane import ControlPlane

PACKAGED = REPOSITORY / "packaging/kubernetes"
OVERLAY = """\
resources: [../kubernetes]
images:
  - name: containerd-shim-grit-installer
    newName: registry.example/grit/installer
  - name: containerd-shim-grit-agent
    newName: registry.example/grit/agent
"""
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
        if one["kind"] in ("DaemonSet", "Deployment")
        for container in one["spec"]["template"]["spec"]["containers"]
    }
