"""What the tests on a real GPU are made of, used on a node with a simulated one: a job is
checkpointed and restored, and what is measured of it is what was there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.gpu import measure
from tests.gpu.job import SHARED, Job
from tests.gpu.results import Results
from tests.simgpu.simgpu import WORKLOAD

if TYPE_CHECKING:
    from pathlib import Path

    from tests.nodes.node import Node

DEVICE_BYTES = 4 << 20


class Standin:
    """A node as the machine of a `Job`."""

    def __init__(self, node: Node) -> None:
        self.path, self.run, self.ctr = node.path, node.run, node.ctr
        self.log = node.containerd_log

    def ctr_words(self, *words: str) -> list[str]:
        return ["ctr", *words]


def test_a_job_there_and_back(tmp_path: Path) -> None:
    with running("forky", cgroup="v2", binds=gpu.kit_binds()) as node:
        board = gpu.gpu_of(node, capacity=16 << 20)
        gpu.configure(node, engine="driver")
        for directory in ("/var/tmp/job", "/var/tmp/images"):
            node.path(directory).mkdir()
        flags = [f"--runtime-config-path={gpu.CONFIG}", "--cpu-shares=0", "--device=/dev/nvidia0"]
        for mount in board.container_mounts():
            options = ":".join(mount["options"])
            source, target = mount["source"], mount["destination"]
            flags.append(f"--mount=type=bind,src={source},dst={target},options={options}")
        flags += [f"--env={entry}" for entry in board.container_env()]
        argv = [WORKLOAD, "--tick-ms", "10", "--status", f"{SHARED}/status", "--seed", "5"]
        argv += ["--bytes", str(DEVICE_BYTES)]
        job = Job(Standin(node), "job", argv, shared="/var/tmp/job", flags=flags)
        job.run()
        before = job.next()
        row = measure.checkpoint(job, "/var/tmp/images/checkpoint")
        went_on = job.next()
        job.save_rootfs("/var/tmp/images/checkpoint")
        job.end()
        assert job.status() == ""
        row |= measure.restore(job, "/var/tmp/images/checkpoint")
        after = job.next()
        job.end()

    assert {before["device"], went_on["device"], after["device"]} == {before["device"]}
    assert before["counter"] < went_on["counter"]
    assert row["engine"] == "driver"
    assert row["cuda"] == 1
    assert row["device"] == DEVICE_BYTES
    assert row["biggest"].startswith("pages-")
    assert row["biggest_bytes"] > DEVICE_BYTES
    assert 0 < row["frozen"] < row["pause"] < row["checkpoint"]
    steps = ("lock", "copy", "freeze", "dump", "checksums", "thaw", "restore", "unlock")
    for step in (*steps, "restored", "criu_restore", "restore_after", "unlock_after"):
        assert row[step] is not None, step
    is_kept(tmp_path, row)


def is_kept(directory: Path, row: dict[str, Any]) -> None:
    """At once, for people and for programs."""
    results = Results(directory)
    results.row("a job", row)
    results.finding("a fault", driver_says="running")
    first, second = map(json.loads, (directory / "results.jsonl").read_text().splitlines())
    assert first["frozen"] == row["frozen"]
    assert second["driver_says"] == "running"
    text = (directory / "results.md").read_text()
    assert f"| a job | {row['device'] / 1e9:.2f} |" in text
    assert "**a fault**: driver says: running" in text
