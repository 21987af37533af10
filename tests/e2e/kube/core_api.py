"""Run in a node: the API server, and pods and events, which the tests' own server has not.

    core_api.py PORT SERVER CREDENTIALS PODS

Pods are files `<namespace>.<name>.json` of the directory PODS: GET reads, DELETE removes them, if
the precondition fits, and what was asked is kept in `asked`. Events that are made are lines of
`events`. All other requests are handed on to SERVER (host:port) with ca.crt, client.crt and
client.key in CREDENTIALS.
"""

from __future__ import annotations

import http.client
import json
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "v1", "namespaces"] and parts[4:5] == ["pods"]:
            self._pod(f"{parts[3]}.{parts[5]}.json", body)
        elif parts[:3] == ["api", "v1", "namespaces"] and parts[4:] == ["events"]:
            with open(Path(sys.argv[4], "events"), "ab") as events:
                events.write(body + b"\n")
            self._answer(201, json.loads(body))
        else:
            self._hand_on(body)

    do_PUT = do_POST = do_DELETE = do_GET

    def _pod(self, name: str, body: bytes) -> None:
        path = Path(sys.argv[4], name)
        with open(Path(sys.argv[4], "asked"), "a") as asked:
            asked.write({"GET": "get", "DELETE": "delete"}[self.command] + "\n")
        try:
            pod = json.loads(path.read_text())
        except FileNotFoundError:
            gone = {"kind": "Status", "reason": "NotFound", "code": 404}
            self._answer(404, {**gone, "details": {"name": name}})
            return
        if self.command == "DELETE":
            if json.loads(body)["preconditions"]["uid"] != pod["metadata"]["uid"]:
                self._answer(409, {"kind": "Status", "reason": "Conflict", "code": 409})
                return
            path.unlink()
        self._answer(200, pod)

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def _hand_on(self, body: bytes) -> None:
        credentials = Path(sys.argv[3])
        context = ssl.create_default_context(cafile=str(credentials / "ca.crt"))
        context.load_cert_chain(credentials / "client.crt", credentials / "client.key")
        server = http.client.HTTPSConnection(sys.argv[2], context=context)
        headers = {k: v for k, v in self.headers.items() if k not in ("Host", "Connection")}
        server.request(self.command, self.path, body or None, headers)
        answer = server.getresponse()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.end_headers()  # HTTP/1.0: the end of the connection is that of the answer
        while piece := answer.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()
        server.close()

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
