"""An optional mutating webhook: a pod that a Restore means is annotated when it is made, and asks
nothing when it starts.

    python -m shim.agent.webhook [--port 8443] [--certificate FILE] [--key FILE]

It needs list of restores, get of checkpoints and update of the status of restores. Only pods whose
specification is known to fit the Checkpoint's are annotated; all else, and whatever comes while it
is away, is left to the agents. Nothing that it is sent or meets keeps a pod from being made.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import click

from shim import bundle, intents
from shim.agent import fitting, podspec
from shim.agent.api import Api, ApiError, Conflict
from shim.agent.claims import CONDITION
from shim.agent.status import age, name_of, set_phase

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from shim.agent.api import Object

ANNOTATED = "Annotated"
"""The condition's reason while the pod has not been heard of."""
_READ_SECONDS = 5.0
_BODY_BYTES = 8 << 20
"""Twice what the API server takes of an object and its old version."""


class Webhook:
    """`say` takes lines for the log."""

    def __init__(self, restores: Api, checkpoints: Api, say: Callable[[str], None]) -> None:
        self._restores, self._checkpoints, self._say = restores, checkpoints, say

    def review(self, body: bytes) -> Object:
        """The answer to an AdmissionReview (admission.k8s.io/v1), which allows it, whatever it
        is."""
        response: dict[str, Any] = {"uid": "", "allowed": True}
        try:
            request = json.loads(body)["request"]
            response["uid"] = request["uid"]
            patch = self._patch(request)
            if patch:
                text = json.dumps(patch).encode()
                response |= {"patchType": "JSONPatch", "patch": base64.b64encode(text).decode()}
        except ApiError as error:
            self._say(f"a pod was let by without a look: {error}")
        except Exception as error:
            self._say(f"a review was let by without a look: {type(error).__name__}: {error}")
        return {
            "apiVersion": "admission.k8s.io/v1",
            "kind": "AdmissionReview",
            "response": response,
        }

    def _patch(self, request: Object) -> list[Object]:
        pod = request["object"]
        notes = pod["metadata"].get("annotations") or {}
        named = {bundle.RESTORE_ANNOTATION, intents.RESTORE_UID}
        if request["operation"] != "CREATE" or pod["kind"] != "Pod" or named & notes.keys():
            return []
        for one in sorted(self._restores.list()[0], key=age):
            if one["metadata"]["namespace"] != request["namespace"]:
                continue
            directory = self._directory(one, pod)
            if directory and (request.get("dryRun") or self._take(one, pod)):
                wanted = {
                    bundle.RESTORE_ANNOTATION: directory,
                    intents.RESTORE_UID: one["metadata"]["uid"],
                }
                path = "/metadata/annotations"
                return [{"op": "add", "path": path, "value": {**notes, **wanted}}]
        return []

    def _directory(self, one: Object, pod: Object) -> str:
        """Where the files are, if the Restore waits for such a pod, else ""."""
        meta = pod["metadata"]
        if (
            one.get("status", {}).get("phase") != "Created"
            or "deletionTimestamp" in one["metadata"]
        ):
            return ""
        owners = {each["uid"] for each in meta.get("ownerReferences") or []}
        if not fitting.means(one, meta.get("labels") or {}, lambda: owners):
            return ""
        name = one["spec"]["checkpointName"]
        checkpoint = self._checkpoints.get(one["metadata"]["namespace"], name)
        if checkpoint is None or fitting.unusable(name, checkpoint):
            return ""
        status = checkpoint["status"]
        saved = status.get("podSpecParts")
        if not saved or podspec.differences(saved, podspec.parts(pod["spec"])):
            return ""
        return str(status["dataPath"])

    def _take(self, one: Object, pod: Object) -> bool:
        """One pod for each Restore; False if another has it."""
        meta = pod["metadata"]
        name = meta.get("name") or meta.get("generateName", "")
        text = (
            f"pod {name} was made with the annotation that restores it. If it never comes, delete "
            "this Restore and make another"
        )
        set_phase(one, "Restoring", CONDITION, ANNOTATED, text)
        one["status"]["targetPod"] = name
        try:
            taken = self._restores.put_status(one) is not None
        except Conflict:
            return False
        if taken:
            self._say(f"restore {name_of(one)}: {text}")
        return taken


class Server(ThreadingHTTPServer):
    """HTTPS at `address`. A certificate that is renewed in its file is taken up. Raises OSError or
    ssl.SSLError."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], certificate: str, key: str, hook: Webhook) -> None:
        self._files, self._loaded = (certificate, key), 0.0
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._reload()
        self.hook = hook
        super().__init__(address, Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            self._reload()
        except OSError as error:  # SSLError too: half of a renewal, or none
            say(f"the certificate is not renewed: {error}")
        connection, peer = super().get_request()
        # The handshake is made by the connection's own thread, when it reads.
        wrapped = self._context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        return wrapped, peer

    def _reload(self) -> None:
        changed = os.stat(self._files[0]).st_mtime
        if changed != self._loaded:
            self._context.load_cert_chain(*self._files)
            self._loaded = changed

    def handle_error(self, request: object, client_address: object) -> None:
        say(f"a connection has failed: {sys.exception()}")


class Handler(BaseHTTPRequestHandler):
    timeout = _READ_SECONDS
    server: Server

    def do_GET(self) -> None:
        self._answer(b"ok\n", "text/plain")

    def do_POST(self) -> None:
        size = self.headers.get("Content-Length", "")
        body = self.rfile.read(min(int(size), _BODY_BYTES)) if size.isdecimal() else b""
        answer = json.dumps(self.server.hook.review(body)).encode()
        self._answer(answer, "application/json")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--port", default=8443, show_default=True)
@click.option("--certificate", default="/etc/grit-webhook/tls.crt", show_default=True)
@click.option("--key", default="/etc/grit-webhook/tls.key", show_default=True)
@click.option("--kubeconfig", envvar="KUBECONFIG", help="Else the pod's service account.")
def main(port: int, certificate: str, key: str, kubeconfig: str | None) -> None:
    """Annotates new pods that a Restore means."""
    try:
        hook = Webhook(Api("restores", kubeconfig), Api("checkpoints", kubeconfig), say)
        server = Server(("", port), certificate, key, hook)
    except (ApiError, OSError) as error:
        raise click.ClickException(str(error)) from None
    server.serve_forever()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
