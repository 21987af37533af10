"""Answers the API server's SubjectAccessReviews as RBAC would, by the rules of ClusterRoles, given
in JSON on standard input. Runs in the control plane's node: its own server has no RBAC.

    authorizer.py PORT < rules.json    # {"<user>": [<rule of a ClusterRole>, ...]}
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def allowed(rules: list[dict[str, Any]], asked: dict[str, Any]) -> bool:
    resource = "/".join(filter(None, (asked.get("resource"), asked.get("subresource"))))
    return any(
        asked.get("group", "") in rule["apiGroups"]
        and resource in rule["resources"]
        and asked["verb"] in rule["verbs"]
        for rule in rules
    )


class Handler(BaseHTTPRequestHandler):
    rules: dict[str, list[dict[str, Any]]]

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        spec = review["spec"]
        if "resourceAttributes" in spec:
            fine = allowed(self.rules.get(spec["user"], []), spec["resourceAttributes"])
        else:
            fine = spec["nonResourceAttributes"]["verb"] == "get"  # as system:discovery
        answer = json.dumps({**review, "status": {"allowed": fine}}).encode()
        self.send_response(201)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    Handler.rules = json.load(sys.stdin)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
