"""Intercepted calls belong to their caller's trace, and end with one line and one count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shim import messages
from shim.tasks import Tasks
from shim.ttrpc import DEADLINE_EXCEEDED, NOT_FOUND, StatusError
from shim.ttrpc.handlers import Call

SERVICE = "containerd.task.v3.Task"
TRACE = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=1",
}


class Inner:
    """A stock shim that answers everything, and remembers with what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.refuses, self.code = "", NOT_FOUND

    def call(
        self,
        service: str,
        method: str,
        payload: bytes = b"",
        *,
        timeout: float | None = None,
        metadata: dict[str, str] | None = None,
    ) -> bytes:
        self.asked.append((method, dict(metadata or {})))
        if method == self.refuses:
            raise StatusError(self.code, "no such task")
        return b""


@pytest.fixture
def inner() -> Inner:
    return Inner()


@pytest.fixture
def tasks(tmp_path: Path, inner: Inner) -> Tasks:
    """With a container `one`, without CUDA, whose metrics go to tmp_path."""
    bundle, home = tmp_path / "bundle", tmp_path / "home"
    bundle.mkdir()
    home.mkdir()
    (home / "tasks").mkdir()
    (bundle / "config.json").write_text("{}")
    state = tmp_path / "runc/ns/one"
    state.mkdir(parents=True)
    config = {"rootfs": "/", "mounts": [], "namespaces": []}
    record = {"id": "one", "init_process_pid": 1, "init_process_start": 1, "config": config}
    (state / "state.json").write_text(json.dumps(record))
    toml = f'Root = "{tmp_path / "runc"}"\n[grit]\nmetrics = "{tmp_path}"\n'
    options = messages.RuntimeOptions(
        type_url=messages.RUNC_OPTIONS, config_body=toml.encode()
    ).encode()
    found = Tasks(inner, "ns", str(home))  # type: ignore[arg-type]
    create = messages.CreateTaskRequest(
        id="one",
        bundle=str(bundle),
        options=messages.Any(type_url=messages.RUNTIME_OPTIONS, value=options),
    )
    ask(found, "Create", create.encode())
    return found


def ask(tasks: Tasks, method: str, payload: bytes, **metadata: str) -> None:
    handler = tasks.handler_for(SERVICE, method)
    assert handler is not None
    handler(Call(SERVICE, method, payload, metadata=metadata, connection=1))


REQUEST = messages.TaskRequest(id="one").encode()


def test_the_trace_goes_on_to_the_stock_shim(tasks: Tasks, inner: Inner) -> None:
    inner.asked.clear()
    ask(tasks, "Pause", REQUEST, **TRACE, secret="stays here")
    assert inner.asked[-1] == ("Pause", TRACE)
    ask(tasks, "Resume", REQUEST)
    assert inner.asked[-1] == ("Resume", {})


def test_one_line_and_one_count_for_each(
    tasks: Tasks, inner: Inner, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(tasks, "Pause", REQUEST, **TRACE)
    said = capfd.readouterr().err
    assert 'msg="suspend done" runtime=grit id=one operation=suspend seconds=0' in said
    assert f"trace={TRACE['traceparent']}" in said
    inner.refuses = "Resume"
    with pytest.raises(StatusError, match="no such task"):
        ask(tasks, "Resume", REQUEST)
    assert 'level=warning msg="resume failed"' in capfd.readouterr().err
    counted = (tmp_path / "grit.prom").read_text()
    assert 'grit_operations_total{operation="suspend",result="ok"} 1\n' in counted
    assert 'grit_operations_total{operation="resume",result="failed"} 1\n' in counted


@pytest.mark.parametrize("seen", [True, False], ids=["ended", "not ended"])
def test_a_kill_waits_for_the_end(tasks: Tasks, inner: Inner, seen: bool) -> None:
    """CRI deletes a task whose Start has failed at once, and only then: it must have ended."""
    one = tasks._containers["one"]
    inner.asked.clear()
    if not seen:
        inner.refuses, inner.code = "Wait", DEADLINE_EXCEEDED
    assert one.kill(5.0) is seen
    assert [method for method, _ in inner.asked] == ["Kill", "Wait"]
