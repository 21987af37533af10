"""The optional webhook over real TLS, with AdmissionReviews as an API server sends them, and what
becomes of the Restores whose pods it has annotated."""

from __future__ import annotations

import base64
import copy
import datetime
import http.client
import ipaddress
import json
import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from shim import bundle, intents, places
from shim.agent import podspec, webhook
from shim.agent.api import Conflict
from shim.agent.webhook import Server, Webhook
from tests.agent.memory import KEY, Client
from tests.agent.test_restores import Node, checkpoints, phase
from tests.agent.test_restores import server as restores

__all__ = ["checkpoints", "restores"]
MAIN = {"name": "main", "image": "example/trainer:7"}

REVIEW = {
    "kind": "AdmissionReview",
    "apiVersion": "admission.k8s.io/v1",
    "request": {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": {"group": "", "version": "v1", "kind": "Pod"},
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "requestKind": {"group": "", "version": "v1", "kind": "Pod"},
        "requestResource": {"group": "", "version": "v1", "resource": "pods"},
        "namespace": "default",
        "operation": "CREATE",
        "userInfo": {"username": "system:serviceaccount:kube-system:job-controller"},
        "object": {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {
                "generateName": "train-",
                "labels": {"app": "train"},
                "annotations": {"team": "a"},
                "creationTimestamp": None,
            },
            "spec": {"runtimeClassName": "grit", "containers": [MAIN]},
            "status": {},
        },
        "oldObject": None,
        "dryRun": False,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    },
}


def certificate(directory, number):
    """A new certificate of 127.0.0.1 in the files that the server reads; the PEM text."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"webhook {number}")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(number)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    kept = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "tls.key").write_bytes(key.private_bytes(pem, *kept))
    (directory / "tls.crt").write_bytes(made.public_bytes(pem))
    return made.public_bytes(pem).decode()


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(webhook, "say", found.append)
    return found


@pytest.fixture
def hook(restores, checkpoints, lines):
    """It, and a Restore that waits for the pod."""
    restores.kept[KEY]["status"] = {"phase": "Created"}
    parts = podspec.parts(REVIEW["request"]["object"]["spec"])
    checkpoints.status(("default", "saved"))["podSpecParts"] = parts
    return Webhook(Client(restores), Client(checkpoints), lines.append)


@pytest.fixture
def served(hook, tmp_path):
    pem = certificate(tmp_path, 1)
    files = str(tmp_path / "tls.crt"), str(tmp_path / "tls.key")
    with Server(("127.0.0.1", 0), *files, hook) as one:
        one.pem = pem
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield one
        one.shutdown()


def post(served, body, pem=""):
    """What the API server gets as an answer, the certificate verified as it does."""
    context = ssl.create_default_context(cadata=pem or served.pem)
    connection = http.client.HTTPSConnection(*served.server_address, context=context, timeout=20)
    connection.request("POST", "/?timeout=5s", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    assert answer.status == 200
    found = json.loads(answer.read())
    connection.close()
    assert (found["kind"], found["apiVersion"]) == ("AdmissionReview", "admission.k8s.io/v1")
    assert found["response"]["allowed"] is True
    return found["response"]


def review(**change):
    """`change` replaces what the request says, the pod's metadata by `metadata`."""
    one = copy.deepcopy(REVIEW)
    one["request"]["object"]["metadata"] |= change.pop("metadata", {})
    one["request"]["object"]["spec"] |= change.pop("spec", {})
    one["request"] |= change
    return json.dumps(one).encode()


def notes_of(response):
    """The pod's annotations after the patch, {} without one."""
    if "patch" not in response:
        return {}
    assert response["patchType"] == "JSONPatch"
    (one,) = json.loads(base64.b64decode(response["patch"]))
    assert (one["op"], one["path"]) == ("add", "/metadata/annotations")
    return one["value"]


def test_the_pod_that_is_meant_is_annotated(served, restores, tmp_path):
    response = post(served, review())
    assert response["uid"] == REVIEW["request"]["uid"]
    assert notes_of(response) == {
        "team": "a",
        "grit.dev/checkpoint": str(tmp_path / "store/default/saved"),
        "grit.dev/restore-uid": "u1",
    }
    assert phase(restores) == ("Restoring", "Annotated")
    assert restores.status()["targetPod"] == "train-"
    assert notes_of(post(served, review())) == {}  # one pod for each Restore


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "UPDATE"},
        {"namespace": "other"},
        {"metadata": {"labels": {"app": "serve"}}},
        {"metadata": {"labels": None}},
        {"metadata": {"annotations": {"grit.dev/checkpoint": "/x"}}},
        {"metadata": {"annotations": {"grit.dev/restore-uid": "u1"}}},
        {"spec": {"containers": [{**MAIN, "image": "example/trainer:8"}]}},
    ],
    ids=["update", "namespace", "labels", "none", "annotated", "forged", "spec"],
)
def test_other_pods_are_left_as_they_are(served, restores, lines, change):
    assert notes_of(post(served, review(**change))) == {}
    assert restores.status() == {"phase": "Created"}
    assert lines == []


def test_a_dry_run_changes_nothing(served, restores):
    assert notes_of(post(served, review(dryRun=True)))["grit.dev/restore-uid"] == "u1"
    assert restores.status() == {"phase": "Created"}


@pytest.mark.parametrize(
    "change",
    [
        lambda restores, saved: restores.status().update(phase="Pending"),
        lambda restores, saved: restores.kept[KEY]["metadata"].update(deletionTimestamp="now"),
        lambda restores, saved: saved.status(("default", "saved")).update(phase="Failed"),
        lambda restores, saved: saved.status(("default", "saved")).pop("podSpecParts"),
        lambda restores, saved: saved.kept.clear(),
    ],
    ids=["claimed", "deleted", "failed", "unknown", "none"],
)
def test_what_is_not_known_to_fit_is_the_agents_(served, restores, checkpoints, change):
    change(restores, checkpoints)
    before = copy.deepcopy(restores.kept)
    assert notes_of(post(served, review())) == {}
    assert restores.kept == before


def test_of_two_webhooks_one_is_first(hook, restores, lines):
    def conflict(one):
        raise Conflict("409")

    hook._restores.put_status = conflict
    assert "patch" not in hook.review(review())["response"]
    assert lines == []


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"{}", b'{"request": {"uid": "u"}}', b"\xff", review(object=None)],
    ids=["empty", "half", "list", "nothing", "uid", "binary", "no object"],
)
def test_bad_input_lets_the_pod_be_made(served, lines, body):
    assert notes_of(post(served, body)) == {}
    assert len(lines) == 1
    assert "let by without a look" in lines[0]


def test_an_api_server_that_is_away_lets_the_pod_be_made(served, restores, lines):
    restores.down = True
    assert post(served, review())["uid"] == REVIEW["request"]["uid"]
    assert lines == ["a pod was let by without a look: down"]


def test_who_speaks_no_tls_or_says_nothing_holds_up_nobody(served, lines):
    with socket.create_connection(served.server_address), socket.socket() as plain:
        plain.connect(served.server_address)
        plain.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert notes_of(post(served, review()))
        plain.settimeout(20)
        while plain.recv(1000):
            pass
    assert "HTTP_REQUEST" in "".join(lines)


def test_a_certificate_that_is_renewed(served, tmp_path, lines):
    assert notes_of(post(served, review(dryRun=True)))
    renewed = certificate(tmp_path, 2)
    assert notes_of(post(served, review(dryRun=True), renewed))
    (tmp_path / "tls.crt").write_text("half")
    assert notes_of(post(served, review(dryRun=True), renewed))
    assert "certificate is not renewed" in lines[0]


@pytest.fixture
def node(hook, tmp_path, restores, checkpoints, monkeypatch):
    """The node that the annotated pod lands on."""
    hook.review(review())
    one = Node(tmp_path, restores, checkpoints)
    monkeypatch.setattr(places, "INTENTS", str(one.directory))
    return one


def container(node, identity, name, **notes):
    """One of an annotated pod, as the shim has it when it is created."""
    one = node.container(identity, name=name)
    spec = bundle.read_spec(one.bundle)
    spec["annotations"] |= {"grit.dev/restore-uid": "u1", **notes}
    bundle.write_spec(one.bundle, spec)
    one.meant = intents.annotated(spec)
    return one


def test_the_restore_ends_with_what_the_shims_tell(node, restores):
    node.agent.step()
    assert node.pending() == []  # nobody has to ask
    node.end(container(node, "c1", "main"))
    assert phase(restores) == ("Restoring", "Annotated")
    node.end(container(node, "c2", "side"))
    assert phase(restores) == ("Restored", "Complete")
    node.end(container(node, "c3", "main"))  # it ended, and is restored again
    assert node.pending() == []


def test_a_restore_that_fails_says_what_to_do(node, restores):
    node.end(container(node, "c1", "main"), "the CPU lacks avx512")
    assert phase(restores) == ("Failed", "RestoreFailed")
    assert "avx512. The pod is annotated with the checkpoint" in restores.message()


def test_it_is_nobodys_to_lose_while_the_pod_is_awaited(node, restores):
    node.start(lease_seconds=0.000001)
    for _ in range(3):
        node.agent.step()
    assert phase(restores) == ("Restoring", "Annotated")


def test_a_pod_of_another_namespace_is_not_believed(node, restores):
    other = {"io.kubernetes.cri.sandbox-namespace": "other"}
    node.end(container(node, "c1", "main", **other), "no")
    assert phase(restores) == ("Restoring", "Annotated")
    assert node.pending() == []
    sandbox = {"io.kubernetes.cri.container-type": "sandbox"}
    assert container(node, "c2", "x", **sandbox).meant == ""
    nameless = {"io.kubernetes.cri.sandbox-namespace": ""}
    assert container(node, "c3", "x", **nameless).meant == ""
