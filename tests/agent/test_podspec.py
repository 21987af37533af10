"""Which pods are alike: what the API server, the scheduler and an operator may change."""

from __future__ import annotations

import copy

import pytest

from shim.agent import podspec

TOKEN = "/var/run/secrets/kubernetes.io/serviceaccount"


def pod(suffix, node):
    """As the API server has it once it is scheduled."""
    token = f"kube-api-access-{suffix}"
    return {
        "nodeName": node,
        "hostname": f"train-{suffix}",
        "serviceAccountName": "default",
        "securityContext": {"fsGroup": 2000},
        "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
        "priority": 0,
        "containers": [
            {
                "name": "main",
                "image": "example/trainer:7",
                "args": ["train.py"],
                "env": [{"name": "RANK", "value": "0"}],
                "resources": {"limits": {"nvidia.com/gpu": "1", "memory": "1Gi"}},
                "volumeMounts": [
                    {"name": "data", "mountPath": "/data"},
                    {"name": token, "mountPath": TOKEN, "readOnly": True},
                ],
            },
            {"name": "side", "image": "example/side:1"},
        ],
        "initContainers": [
            {"name": "fetch", "image": "example/fetch:1"},
            {"name": "proxy", "image": "example/proxy:1", "restartPolicy": "Always"},
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "data-0"}},
            {"name": token, "projected": {"sources": [{"serviceAccountToken": {"path": node}}]}},
        ],
    }


def main_of(spec):
    return spec["containers"][0]


def renamed(spec):
    spec["volumes"][0]["name"] = main_of(spec)["volumeMounts"][0]["name"] = "other"


SAME = {
    "nothing": lambda spec: None,
    "more memory": lambda spec: main_of(spec)["resources"]["limits"].update(memory="2Gi"),
    "tolerations": lambda spec: spec.update(tolerations=[]),
    "a probe": lambda spec: main_of(spec).update(livenessProbe={"tcpSocket": {"port": 1}}),
    "a volume's name": renamed,
    "an init container": lambda spec: spec["initContainers"][0].update(image="example/fetch:2"),
    "a new sidecar": lambda spec: spec["containers"].append({"name": "log", "image": "log:1"}),
    "an empty field": lambda spec: spec.update(hostNetwork=False, hostUsers=True),
}

OTHER = {
    "image": (lambda spec: main_of(spec).update(image="x:1"), "image of container main"),
    "arguments": (lambda spec: main_of(spec).update(args=["-v"]), "args of container main"),
    "environment": (lambda spec: main_of(spec)["env"].pop(), "env of container main"),
    "GPUs": (
        lambda spec: main_of(spec)["resources"]["limits"].update({"nvidia.com/gpu": "2"}),
        "devices of container main",
    ),
    "volume": (
        lambda spec: spec["volumes"][0].update(persistentVolumeClaim={"claimName": "data-1"}),
        "volumeMounts of container main",
    ),
    "mount": (
        lambda spec: main_of(spec)["volumeMounts"][0].update(mountPath="/other"),
        "volumeMounts of container main",
    ),
    "network": (lambda spec: spec.update(hostNetwork=True), "hostNetwork"),
    "users": (lambda spec: spec.update(hostUsers=False), "hostUsers"),
    "account": (lambda spec: spec.update(serviceAccountName="x"), "serviceAccountName"),
    "native sidecar": (
        lambda spec: spec["initContainers"][1].update(image="x:1"),
        "image of container proxy",
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_a_successor(what):
    there = pod("c4m8d", "node-b")
    SAME[what](there)
    here = podspec.parts(pod("x7k2p", "node-a"))
    assert podspec.differences(here, podspec.parts(there)) == ""


def test_of_two_that_share_all_the_hash_is_one():
    one, other = (podspec.parts(pod(*words)) for words in (("a", "node-a"), ("b", "node-b")))
    assert podspec.digest(one) == podspec.digest(other)
    assert podspec.digest(one) != podspec.digest({**one, "hostIPC": "x"})


@pytest.mark.parametrize("what", OTHER)
def test_another_pod(what):
    change, told = OTHER[what]
    there = copy.deepcopy(pod("c4m8d", "node-b"))
    change(there)
    here = podspec.parts(pod("x7k2p", "node-a"))
    found = podspec.parts(there)
    assert podspec.differences(here, found) == f"differs in {told}"
    assert podspec.differences(found, here) == f"differs in {told}"
    assert podspec.digest(here) != podspec.digest(found)


def test_a_container_that_is_missing():
    there = pod("c4m8d", "node-b")
    there["containers"].pop()
    there["hostIPC"] = True
    told = podspec.differences(podspec.parts(pod("x7k2p", "node-a")), podspec.parts(there))
    assert told == "has no container side and differs in hostIPC"


def test_values_are_not_kept():
    spec = {"containers": [{"name": "main", "env": [{"name": "TOKEN", "value": "hunter2"}]}]}
    assert "hunter2" not in str(podspec.parts(spec))
