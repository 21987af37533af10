"""The lane under stock containerd: device memory goes past CRIU and comes back, whole or not at
all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from shim import announced, places
from shim.criu_bridge import images as criu_images
from shim.cuda import discovery
from shim.ttrpc import StatusError
from tests.e2e.failpoints import held, told
from tests.e2e.faults import Direct, checkpointing
from tests.e2e.gpu import STATUS, configure, go_on, honouring, restored_by_annotation, until
from tests.e2e.marks import on_13, on_forky
from tests.e2e.test_gritctl_stored import gritctl
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import Report, SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

MIB = 1 << 20

# What does not depend on the node.

TRACER = """
import ctypes, sys
assert ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None) == 0  # PTRACE_SEIZE
print("has it", flush=True)
sys.stdin.read()
"""
SETTINGS = {"engine": "driver", "lane_from": MIB}


@contextlib.contextmanager
def traced(pid: int) -> Iterator[None]:
    command = [sys.executable, "-c", TRACER, str(pid)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as tracer:
        assert tracer.stdout
        assert tracer.stdout.readline()
        yield
        tracer.communicate()


def begin(node: Node, start_job: StartJob, *words: str) -> tuple[Job, Report]:
    """A job whose memory goes by the lane, and what it said of itself."""
    configure(node, **SETTINGS)
    job = start_job(*words, runtime=honouring(node))
    return job, job.next_report()


def manifest(node: Node, images: str) -> Any:
    return json.loads(node.path(f"{images}/grit.json").read_text())


def end_by_checkpoint(job: Job, images: str) -> None:
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()


def lane_bytes(node: Node, images: str) -> int:
    """Of the files that the manifest says are the lane's, all of which are there."""
    shards = [s for process in manifest(node, images)["cuda_processes"] for s in process["lane"]]
    assert {s[0] for s in shards} == {
        entry.name for entry in node.path(images).iterdir() if entry.name.startswith("lane-")
    }
    return sum(size for _, _, size, *_ in shards)


def test_goes_on_with_its_memory_filled_in_again(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    node, board = gpu_node
    job, before = begin(node, start_job, "--procs", "ctx,ctx")
    job.checkpoint_task(images)
    assert job.status() == "RUNNING"
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    go_on(before, job.next_report())
    assert lane_bytes(node, images) >= 3 * 4 * MIB
    for process in manifest(node, images)["cuda_processes"]:
        inner, regions = process["inner"][0], [tuple(region) for region in process["regions"]]
        _, seen = criu_images.pages_within(str(node.path(images)), inner, regions)
        assert seen < 4 * MIB  # by CRIU


def test_ends_and_comes_back(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, board = gpu_node
    configure(node, **SETTINGS)
    job = start_job("--procs", "ctx,cpu", runtime=honouring(node))
    names = [STATUS, f"{STATUS}.p0", f"{STATUS}.p1"]
    before = [job.next_report(name) for name in names]
    end_by_checkpoint(job, images)
    assert lane_bytes(node, images) >= 2 * 4 * MIB
    again = restored_by_annotation(start_job, images)
    for name, one in zip(names, before, strict=True):
        go_on(one, again.next_report(name))
    for name in names:
        counts = [report.counter for report in again.reports(name)]
        assert counts == list(range(len(counts)))
    again.checkpoint_task(f"{images}2", check=False)  # once more, from what came back
    assert board.library.state(again.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)


@on_forky
def test_what_could_not_be_filled_in_is_by_the_next_resume(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """Until then the container stands still: nothing of it is to find out. Its files are held
    open, whoever removes them."""
    node, _ = gpu_node
    job, before = begin(node, start_job)
    with Direct(job) as shim:
        shim.call("Pause")
        shim.checkpoint(images)
        shutil.rmtree(node.path(images))
        with told(node, "refill", "raise"), pytest.raises(StatusError, match="failpoint"):
            shim.call("Resume")
        assert job.status() == "PAUSED"
        shim.call("Resume")
    go_on(before, job.next_report())
    job.checkpoint_task(images)
    go_on(before, job.next_report())


@on_forky
def test_what_a_failed_dump_left_is_filled_in_by_the_resume(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """The files are all there is of the memory: the draft is kept until then."""
    node, _ = gpu_node
    job, before = begin(node, start_job)
    with told(node, "publish", "raise"), told(node, "refill", "raise"):
        done = job.checkpoint_task(images, check=False)  # ctr resumes, whatever came of it
    assert done.returncode != 0
    go_on(before, job.next_report())
    assert [entry.name for entry in node.path(images).parent.iterdir()] == []


@on_forky
@pytest.mark.parametrize("compression", ["off", "zstd"])
def test_what_could_not_be_filled_in_is_before_the_next_dump(
    gpu_node: Place, start_job: StartJob, images: str, compression: str
) -> None:
    """Else that would have zeros in its place, and be taken for a checkpoint."""
    node, _ = gpu_node
    configure(node, **SETTINGS, lane_compression=compression)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    with Direct(job) as shim:
        shim.call("Pause")
        shim.checkpoint(f"{images}-before")
        with told(node, "refill", "raise"), pytest.raises(StatusError, match="stays paused"):
            shim.checkpoint(f"{images}-failed")
        shim.checkpoint(images)
        job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
        shim.call("Resume")
    go_on(before, job.next_report())
    left = {entry.name for entry in node.path(images).parent.iterdir()}
    assert left == {"checkpoint", "checkpoint-before", "rootfs-diff.tar"}
    assert manifest(node, images).get("compression", {}) == (
        {} if compression == "off" else {"algorithm": "zstd", "why": "configured"}
    )
    place = images.removesuffix("/checkpoint")
    assert ("by zstd, to " in gritctl(node, "show", place)) == (compression == "zstd")
    gritctl(node, "verify", place)
    job.end()
    go_on(before, restored_by_annotation(start_job, images).next_report())


@pytest.fixture
def announcing(
    gpu_node: Place, images: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Job], contextlib.AbstractContextManager[None]]:
    """That a client in the node has a checkpoint of a job in mind, to `images`."""
    node, _ = gpu_node
    monkeypatch.setattr(places, "ANNOUNCED", str(node.path(places.ANNOUNCED)))
    return lambda job: announced.announcing("default", job.name, images)


@on_13
def test_written_before_the_freeze_where_it_is_announced(
    gpu_node: Place, start_job: StartJob, images: str, announcing: Callable[..., Any]
) -> None:
    node, _ = gpu_node
    job, before = begin(node, start_job, "--procs", "ctx,ctx")
    with Direct(job) as shim, ThreadPoolExecutor(1) as calls:
        with announcing(job), held(node, "lane") as lane:
            pause = calls.submit(shim.call, "Pause")
            lane.reached()
            assert job.status() == "RUNNING"
            lane.go_on()
            pause.result(60)
        shim.checkpoint(images)
        job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
        with held(node, "refill") as refill:
            resume = calls.submit(shim.call, "Resume")
            refill.reached()
            assert job.status() == "RUNNING"
            refill.go_on()
            resume.result(60)
    go_on(before, job.next_report())
    assert {"lane_write", "lane_check"} <= manifest(node, images)["phases"].keys()
    assert lane_bytes(node, images) >= 3 * 4 * MIB
    job.end()
    go_on(before, restored_by_annotation(start_job, images).next_report())


@on_13
def test_what_has_changed_since_it_was_written_is_moved_by_criu(
    gpu_node: Place, start_job: StartJob, images: str, announcing: Callable[..., Any]
) -> None:
    node, _ = gpu_node
    job, _ = begin(node, start_job)
    with Direct(job) as shim:
        with announcing(job):
            shim.call("Pause")
        (draft,) = node.path(images).parent.iterdir()
        shard = max(draft.glob("lane-*"), key=lambda path: path.stat().st_size)
        data, found = shard.read_bytes(), 0
        for start, end in discovery.anonymous_memory(job.pid()):
            if end - start >= len(data):
                with open(f"/proc/{job.pid()}/mem", "r+b", buffering=0) as memory:
                    memory.seek(start)
                    if memory.read(len(data)) == data:
                        memory.seek(start + len(data) - 1)
                        memory.write(bytes([data[-1] ^ 1]))
                        found += 1
        assert found
        shim.checkpoint(images)
        shim.call("Resume")
    assert "has changed since it was written" in node.containerd_log()
    assert not list(node.path(images).glob("lane-*"))


@on_13
def test_what_was_announced_and_never_came_leaves_nothing(
    gpu_node: Place, start_job: StartJob, images: str, announcing: Callable[..., Any]
) -> None:
    """Neither where no Checkpoint follows, nor where it names another directory."""
    node, _ = gpu_node
    job, before = begin(node, start_job)
    beside = node.path(images).parent
    with Direct(job) as shim:
        for other in ("", f"{images}-other"):
            with announcing(job):
                shim.call("Pause")
            (draft,) = beside.iterdir()
            assert list(draft.glob("lane-*"))
            if other:
                shim.checkpoint(other)
            shim.call("Resume")
            go_on(before, job.next_report())
            assert [entry.name for entry in beside.iterdir()] == [
                os.path.basename(name) for name in (other,) if name
            ]
    assert lane_bytes(node, f"{images}-other") >= 4 * MIB


@on_13
def test_through_the_content_store(gpu_node: Place, start_job: StartJob) -> None:
    """containerd packs the images and unpacks them elsewhere."""
    node, board = gpu_node
    configure(node, **SETTINGS)
    job = start_job()
    before = job.next_report()
    job.checkpoint_container("local/lane:1")
    go_on(before, job.next_report())
    job.end()
    assert board.owners() == {}
    job.restore_container("local/lane:1")
    go_on(before, job.next_report())


@on_13
def test_where_nothing_can_be_dropped_criu_moves_it(
    gpu_node: Place, start_job: StartJob, images: str
) -> None:
    """Another tracer has a thread of the container's."""
    node, _ = gpu_node
    job, before = begin(node, start_job)
    mark = len(node.containerd_log())
    with held(node, "drop") as drop, held(node, "dump") as dump:
        client = checkpointing(job, images)
        drop.reached()
        with traced(job.pid()):
            drop.go_on()
            dump.reached()
        dump.go_on()
        client.communicate(timeout=60)
    assert "the lane cannot be used" in node.containerd_log()[mark:]
    assert client.returncode == 0
    go_on(before, job.next_report())
    assert not list(node.path(images).glob("lane-*"))
    assert all(process["lane"] == [] for process in manifest(node, images)["cuda_processes"])


@on_forky
@pytest.mark.parametrize("how", ["flipped", "short", "gone"])
def test_a_damaged_file_is_refused_before_anything_runs(
    gpu_node: Place, start_job: StartJob, images: str, how: str
) -> None:
    node, _ = gpu_node
    configure(node, **SETTINGS)
    job = start_job(runtime=honouring(node))
    end_by_checkpoint(job, images)
    (shard,) = node.path(images).glob("lane-*")
    data = shard.read_bytes()
    if how == "flipped":
        shard.write_bytes(data[:9999] + bytes([data[9999] ^ 4]) + data[10000:])
    elif how == "short":
        shard.write_bytes(data[:-1])
    else:
        shard.unlink()
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    again = start_job(options=[note], run=False)
    done = again.try_run()
    assert done.returncode != 0
    assert shard.name in done.stderr
    assert again.status() in ("", "STOPPED", "CREATED")
