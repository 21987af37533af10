"""What a node tells of its checkpoints: counters that Prometheus reads, a log line for each
operation, and the trace of the caller."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e import gpu
from tests.e2e.gpu import configure, until
from tests.e2e.test_gritctl_stored import gritctl

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

METRICS = "/run/grit-metrics"
DIR = "/var/lib/checkpoints/observed"


def counted(node: Node) -> dict[str, float]:
    text = node.path(f"{METRICS}/grit.prom").read_text()
    return {
        f"{sample.name}{sorted(sample.labels.values())}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_counters_and_lines(gpu_node: Place, start_job: StartJob) -> None:
    node, board = gpu_node
    node.run(["mkdir", METRICS])
    configure(node, metrics=METRICS, lock_timeout=0.5)
    job = start_job()
    already = len(node.containerd_log())
    gritctl(node, "checkpoint", "job", "--to", DIR)
    board.fault("lock=never")
    gritctl(node, "suspend", "job", status=1)
    board.end_faults()
    job.end()
    start_job(run=False)
    gritctl(node, "restore", DIR)
    found = counted(node)
    assert found["grit_operations_total['ok', 'suspend']"] == 1
    assert found["grit_operations_total['failed', 'suspend']"] == 1
    for operation in ("checkpoint", "resume", "restore"):
        assert found[f"grit_operations_total{sorted([operation, 'ok'])}"] == 1
    for phase in ("suspend", "dump", "checksums", "criu_restore"):
        assert found[f"grit_phase_seconds_count['{phase}']"] == 1
    assert found["grit_phase_seconds_count['gpu_restore']"] == 2  # Resume and restore
    assert found["grit_device_bytes_total[]"] == 4 << 20
    assert found["grit_image_bytes_total[]"] > 4 << 20
    log = until("the log", lambda: _with(node.containerd_log()[already:], "restore done"))
    for line in (
        r'msg=\\?"suspend done\\?" runtime=grit id=job operation=suspend seconds=[\d.]+ suspend=',
        r'msg=\\?"checkpoint done\\?" .*id=job.* dump=[\d.]+ checksums=[\d.]+',
        r'msg=\\?"suspend failed\\?"',
        r'msg=\\?"restore done\\?" .*criu_restore=[\d.]+',
    ):
        assert re.search(line, log), line
    gritctl(node, "rm", DIR)
    node.run(["rm", "-r", METRICS])


def _with(log: str, words: str) -> str:
    return log if words in log else ""


def test_a_trace_goes_through_containerd(make_node: Callable[..., Node]) -> None:
    """containerd 2.1 with its OTLP exporter switched on: what the shim sees is of our trace."""
    ours = "0af7651916cd43dd8448eb211c80319c"
    env = {
        **gpu.ENVIRONMENT_OF_GRIT,
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    }
    node = make_node("forky", binds=gpu.kit_binds(), env=env)
    board = gpu.gpu_of(node, capacity=16 << 20)
    configure(node)
    gpu.Job(node, board, "job").run()
    done = node.run(
        ["gritctl", "suspend", "job"], env={"TRACEPARENT": f"00-{ours}-b7ad6b7169203331-01"}
    )
    assert "job: frozen" in done.stdout
    log = until("the log", lambda: _with(node.containerd_log(), "suspend done"))
    assert re.search(rf"operation=suspend .* trace=00-{ours}-[0-9a-f]{{16}}-01", log)
