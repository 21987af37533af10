"""The client against a server that speaks HTTP: what it asks for, and what it makes of answers."""

from __future__ import annotations

import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shim.agent.api import Api, ApiError, Conflict, PodsApi, Unanswered

ONE = {"metadata": {"namespace": "ns", "name": "one", "uid": "u1", "resourceVersion": "5"}}
ALL = "/apis/kaito.sh/v1alpha1/checkpoints"
PATH = "/apis/kaito.sh/v1alpha1/namespaces/ns/checkpoints/one"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        path, _, query = self.path.partition("?")
        self.server.asked.append((self.command, path, query, body))
        self.server.answers.wait()
        status, answer = self.server.answer
        data = json.dumps(answer).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        one.asked, one.answer = [], (200, ONE)
        one.answers = threading.Event()
        one.answers.set()
        threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True).start()
        yield one
        one.answers.set()
        one.shutdown()


@pytest.fixture
def config(server, tmp_path):
    pytest.importorskip("kubernetes")
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [
            {"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}
        ],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "config").write_text(json.dumps(config))
    return str(tmp_path / "config")


@pytest.fixture
def api(config):
    return Api("checkpoints", config)


def test_all_and_then_what_changes(api, server):
    server.answer = (200, {"items": [ONE], "metadata": {"resourceVersion": "9"}})
    assert api.list() == ([ONE], "9")
    server.answer = (200, {"type": "ADDED", "object": ONE})
    api.wait("9", 3)
    (_, first, _, _), (_, then, query, _) = server.asked
    assert (first, then) == (ALL, ALL)
    assert {"watch=true", "resourceversion=9", "timeoutseconds=3"} <= set(query.lower().split("&"))


def test_writes_carry_the_version(api, server):
    assert api.put_status(ONE) == ONE
    assert api.put(ONE) == ONE
    assert server.asked == [("PUT", f"{PATH}/status", "", ONE), ("PUT", PATH, "", ONE)]


def test_only_this_very_one_is_deleted(api, server):
    api.delete(ONE)
    ((method, path, _, body),) = server.asked
    assert (method, path, body) == ("DELETE", PATH, {"preconditions": {"uid": "u1"}})


def test_one_that_is_there_already_is_left(api, server):
    api.create(ONE)
    ((method, path, _, body),) = server.asked
    assert (method, path, body) == ("POST", os.path.dirname(PATH), ONE)
    server.answer = (409, {"reason": "AlreadyExists"})
    api.create(ONE)


def test_pods(config, server):
    pods = PodsApi(config)
    assert pods.get("ns", "one") == ONE
    pods.delete(ONE)
    path = "/api/v1/namespaces/ns/pods/one"
    assert server.asked == [
        ("GET", path, "", None),
        ("DELETE", path, "", {"preconditions": {"uid": "u1"}}),
    ]
    for status, reason in ((409, "Conflict"), (404, "NotFound")):
        server.answer = (status, {"reason": reason, "details": {"name": "one"}})
        pods.delete(ONE)
    assert pods.get("ns", "one") is None
    server.answer = (403, {"message": "not yours"})
    with pytest.raises(ApiError, match=r"answered 403 .*not yours"):
        pods.get("ns", "one")


def test_gone_and_overtaken(api, server):
    server.answer = (404, {"reason": "NotFound", "details": {"name": "one"}})
    assert api.get("ns", "one") is None
    assert api.put_status(ONE) is None
    api.delete(ONE)
    server.answer = (409, {"reason": "Conflict"})
    with pytest.raises(Conflict):
        api.put(ONE)


def test_errors_are_told(api, server):
    server.answer = (403, {"message": "not yours"})
    with pytest.raises(ApiError, match=r"answered 403 .*not yours"):
        api.list()
    server.answer = (
        200,
        {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": ""}},
    )
    with pytest.raises(ApiError, match="410"):
        api.wait("1", 3)


@pytest.mark.parametrize("told", ["404 page not found", {"reason": "NotFound", "details": {}}])
def test_a_server_that_does_not_serve_the_kind_yet_is_no_sign_that_one_is_gone(api, server, told):
    server.answer = (404, told)
    for ask in (lambda: api.get("ns", "one"), lambda: api.put_status(ONE)):
        with pytest.raises(ApiError, match="404"):
            ask()


def test_what_is_not_answered_is_asked_once(api, server, monkeypatch):
    """A claim has to be renewed before it has run out."""
    monkeypatch.setattr("shim.agent.api._CALL_SECONDS", 0.2)
    server.answers.clear()
    for ask in (api.list, lambda: api.get("ns", "one"), lambda: api.put_status(ONE)):
        with pytest.raises(Unanswered):
            ask()
    assert len(server.asked) == 3


def test_without_any_server(tmp_path):
    pytest.importorskip("kubernetes")
    with pytest.raises(ApiError, match="no way to the API server"):
        Api("checkpoints", str(tmp_path / "none"))
