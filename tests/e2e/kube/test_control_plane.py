"""The control plane that the tests of the resources stand on: it validates, keeps a status apart,
lets a node in over TLS, tells who asked what, and comes back after each of its parts was killed."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

from tests.e2e import gpu
from tests.e2e.kube.control_plane import ADDRESS, BINARIES
from tests.nodes import apiserver
from tests.nodes.node import Node

if TYPE_CHECKING:
    from tests.e2e.kube.control_plane import ControlPlane

CRD = """\
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: things.tests.example}
spec:
  group: tests.example
  scope: Namespaced
  names: {kind: Thing, plural: things, singular: thing, listKind: ThingList}
  versions:
    - name: v1
      served: true
      storage: true
      subresources: {status: {}}
      additionalPrinterColumns: [{name: Phase, type: string, jsonPath: .status.phase}]
      schema:
        openAPIV3Schema:
          type: object
          required: [spec]
          properties:
            spec:
              type: object
              required: [size]
              properties: {size: {type: integer, minimum: 1}}
            status:
              type: object
              properties: {phase: {type: string}}
"""

THING = """\
apiVersion: tests.example/v1
kind: Thing
metadata: {name: one, namespace: default}
spec: {size: %s}
"""


def test_it_validates_watches_and_survives(plane: ControlPlane) -> None:
    plane.apply(CRD)
    plane.kubectl("wait", "--for=condition=Established", "crd/things.tests.example")

    refused = plane.apply(THING % "0", check=False)
    assert refused.returncode == 1
    assert "spec.size" in refused.stderr
    assert plane.get("things")["items"] == []

    plane.apply(THING % "1")
    watch = plane.node.popen(
        plane.command("get", "thing", "one", "--watch", "--no-headers"), stdout=subprocess.PIPE
    )
    assert watch.stdout
    assert watch.stdout.readline().split()[0] == "one"
    # From a node that joined; the agent's own certificate is for other things.
    with Node(apiserver.NODE, binds={BINARIES: apiserver.directory()}) as node:
        status = json.dumps({"spec": {"size": 7}, "status": {"phase": "Begun"}})
        patch = ["patch", "thing", "one", "--subresource=status", "--type=merge", "-p", status]
        kubectl = [f"{BINARIES}/kubectl", f"--kubeconfig={plane.join(node)}"]
        refused = node.run([*kubectl, *patch], check=False)
        assert "Forbidden" in refused.stderr
        node.path("/root/admin.conf").write_text(plane.kubeconfig("admin", ADDRESS))
        node.run([kubectl[0], "--kubeconfig=/root/admin.conf", *patch])
    assert watch.stdout.readline().split()[:2] == ["one", "Begun"]
    watch.kill()
    watch.communicate()
    thing = plane.get("thing", "one")
    assert (thing["spec"], thing["status"]) == ({"size": 1}, {"phase": "Begun"})
    asked = {(e["verb"], e["objectRef"].get("subresource")) for e in plane.audit()
             if e.get("objectRef", {}).get("resource") == "things"}  # fmt: skip
    assert asked == {("get", "status")}

    for name, start in (("apiserver", plane.start_server), ("etcd", plane.start_etcd)):
        plane.stop(name)
        lost = plane.kubectl("get", "things", "--request-timeout=2s", check=False)
        assert lost.returncode
        start()
        gpu.until(
            f"the thing, {name} being back",
            lambda: plane.kubectl("get", "thing", "one", check=False).returncode == 0,
            60,
        )
    assert plane.get("thing", "one")["metadata"]["uid"] == thing["metadata"]["uid"]
    plane.kubectl("delete", "crd", "things.tests.example")
