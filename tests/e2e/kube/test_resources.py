"""The resources, as the API server takes them: GRIT's manifests as they are, wrong ones refused by
field, the columns that `kubectl get` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.kube.control_plane import ControlPlane

# The manifest of GRIT's quick start.
CHECKPOINT = {
    "podName": "train",
    "autoMigration": False,
    "volumeClaim": {"claimName": "ckpt-store"},
}
RESTORE = {"checkpointName": "demo", "selector": {"matchLabels": {"app": "train"}}}


def applied(plane: ControlPlane, kind: str, spec: dict[str, Any]) -> str:
    """What kubectl says of a manifest; "" if it was taken."""
    manifest = {
        "apiVersion": "kaito.sh/v1alpha1",
        "kind": kind,
        "metadata": {"name": "demo", "namespace": "default"},
        "spec": spec,
    }
    done = plane.apply(json.dumps(manifest), check=False)
    return done.stderr if done.returncode else ""


@pytest.mark.parametrize(
    ("kind", "change", "told"),
    [
        ("Checkpoint", {"podName": None}, "spec.podName"),
        ("Checkpoint", {"podName": ""}, "spec.podName"),
        ("Checkpoint", {"podName": "../etc"}, "spec.podName"),
        ("Checkpoint", {"podName": 7}, "spec.podName"),
        ("Checkpoint", {"autoMigration": "yes"}, "spec.autoMigration"),
        ("Checkpoint", {"volumeClaim": {}}, "spec.volumeClaim.claimName"),
        ("Checkpoint", {"volumeClaim": {"claimName": ""}}, "spec.volumeClaim.claimName"),
        ("Checkpoint", {"volumeClaim": {"claimName": "a", "readOnly": 1}}, "readOnly"),
        ("Checkpoint", {"ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished"),
        ("Restore", {"checkpointName": None}, "spec.checkpointName"),
        ("Restore", {"checkpointName": ""}, "spec.checkpointName"),
        ("Restore", {"selector": None}, "a selector or an ownerRef"),
        ("Restore", {"selector": {}}, "an empty selector"),
        ("Restore", {"selector": {"matchLabels": {"app": 7}}}, "spec.selector.matchLabels"),
        (
            "Restore",
            {"selector": {"matchExpressions": [{"key": "app", "operator": "Like"}]}},
            "spec.selector.matchExpressions[0].operator",
        ),
        ("Restore", {"selector": None, "ownerRef": {"name": "job"}}, "a selector or an ownerRef"),
    ],
)
def test_a_wrong_field_is_named(
    resources: ControlPlane, kind: str, change: dict[str, Any], told: str
) -> None:
    spec = {**(CHECKPOINT if kind == "Checkpoint" else RESTORE), **change}
    said = applied(resources, kind, {k: v for k, v in spec.items() if v is not None})
    assert told in said
    assert resources.get(kind.lower())["items"] == []


def test_grit_s_manifests_and_what_is_printed(resources: ControlPlane) -> None:
    plane = resources
    assert applied(plane, "Checkpoint", CHECKPOINT) == ""
    assert applied(plane, "Restore", RESTORE) == ""
    for kind, pod in (("checkpoint", "train"), ("restore", "train-2")):
        status = {"status": {"phase": "Pending", "targetPod": "train-2", "nodeName": "a"}}
        if kind == "checkpoint":
            del status["status"]["targetPod"]
        patch = ["patch", kind, "demo", "--subresource=status", "--type=merge"]
        plane.kubectl(*patch, "-p", json.dumps(status))
        printed = plane.kubectl("get", kind).stdout.splitlines()
        assert [line.split() for line in printed] == [
            ["NAME", "PHASE", "POD"],
            ["demo", "Pending", pod],
        ]
        status["status"]["phase"] = "Done"
        wrong = plane.kubectl(*patch, "-p", json.dumps(status), check=False)
        assert "status.phase" in wrong.stderr
    # What was asked for stays asked for.
    moved = applied(plane, "Checkpoint", {**CHECKPOINT, "podName": "other"})
    assert "podName cannot be changed" in moved
    moved = applied(plane, "Checkpoint", {"podName": "train"})
    assert "volumeClaim cannot be changed" in moved
    moved = applied(plane, "Restore", {**RESTORE, "checkpointName": "other"})
    assert "checkpointName cannot be changed" in moved
    plane.kubectl("delete", "checkpoint,restore", "demo")
