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


def test_the_base_and_an_overlay(plane: ControlPlane) -> None:
    node = plane.node
    shutil.copytree(PACKAGED, node.path("/root/kubernetes"))
    node.path("/root/overlay").mkdir()
    node.path("/root/overlay/kustomization.yaml").write_text(OVERLAY)

    def built(directory: str) -> list[Any]:
        return list(yaml.safe_load_all(plane.kubectl("kustomize", directory).stdout))

    files = {path for path in PACKAGED.rglob("*.yaml") if path.parent.name != "examples"}
    files -= {PACKAGED / "kustomization.yaml"}
    written = [one for path in files for one in yaml.safe_load_all(path.read_text())]
    base = built("/root/kubernetes")
    assert sorted(base, key=str) == sorted(written, key=str)

    images = {
        container["image"]
        for one in built("/root/overlay")
        if one["kind"] == "DaemonSet"
        for container in one["spec"]["template"]["spec"]["containers"]
    }
    assert images == {
        f"registry.example/grit/{name}:{__version__}" for name in ("agent", "installer")
    }
