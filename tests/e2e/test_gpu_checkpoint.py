"""GPU containers checkpointed and restored through stock containerd, with either engine: the same
job, the same memory, nothing written in between, nothing left behind."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.gpu import STATUS, configure, go_on, honouring, restored_by_annotation, until
from tests.simgpu import simgpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]


def manifest(node: Node, images: str) -> Any:
    return json.loads(node.path(f"{images}/grit.json").read_text())


def diff_beside(images: str) -> str:
    return images.replace("/checkpoint", "/rootfs-diff.tar")


def unbroken(job: Job, status: str = STATUS) -> None:
    """The file goes with the memory: each count was written once, and none is missing."""
    counts = [report.counter for report in job.reports(status)]
    assert counts == list(range(len(counts)))


def test_checkpoint_goes_on(gpu_node: Place, start_job: StartJob, images: str, engine: str) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    held = board.owners()
    before = job.next_report()
    job.checkpoint_task(images)
    assert job.status() == "RUNNING"
    assert board.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    assert board.owners() == held
    go_on(before, job.next_report())
    unbroken(job)
    written = manifest(node, images)
    assert written["engine"] == engine
    (process,) = written["cuda_processes"]
    assert process["pid"] == job.node_pid()
    names = {entry.name for entry in node.path(images).iterdir()}
    assert names == {*written["files"], "grit.json"}
    assert "inventory.img" in names
    pages = sum(written["files"][name]["size"] for name in names if name.startswith("pages-"))
    assert pages > 4 << 20  # the device memory is in it
    assert node.path(images).stat().st_mode & 0o777 == 0o700


def test_a_child_forked_after_cuda_came_up(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """As PyTorch's data loaders are: CRIU would refuse it for what it inherited of the GPU."""
    node, _ = gpu_node
    configure(node, engine=engine)
    job = start_job("--kind", "fork", runtime=honouring(node))
    job.checkpoint_task(images)
    job.remove_checkpoints()  # ctr names them by the second
    child = f"{STATUS}.mainc"
    before = job.next_report(), job.next_report(child)
    job.checkpoint_task(f"{images}2", "--exit")
    job.save_rootfs(diff_beside(images))
    job.end()
    node.run(["rm", "-r", images])
    node.run(["mv", f"{images}2", images])
    again = restored_by_annotation(start_job, images)
    go_on(before[0], again.next_report())
    go_on(before[1], again.next_report(child))
    node.run(["rm", "-r", images])


def test_checkpoint_into_content_store(gpu_node: Place, start_job: StartJob) -> None:
    """Where no image path reaches the shim (containerd 1.7 under any name but runc's), or none is
    given, the images end up where containerd takes them from."""
    node, _ = gpu_node
    configure(node)
    job = start_job()
    before = job.next_report()
    job.ctr("task", "checkpoint", job.name)
    go_on(before, job.next_report())
    (image,) = [
        name for name in job.ctr("images", "ls", "-q").stdout.split() if "checkpoint" in name
    ]
    job.ctr("images", "rm", "--sync", image)


def test_exit_and_restore_by_annotation(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    assert board.owners() == {}
    job.save_rootfs(diff_beside(images))
    job.end()

    after = restored_by_annotation(start_job, images)
    go_on(before, after.next_report())
    unbroken(after)
    assert sum(board.owners().values()) == 4 << 20


@pytest.mark.parametrize(
    ("gpu_node", "engine"), [("13", "driver"), ("forky", "plugin")], indirect=True, scope="session"
)
def test_three_rounds(gpu_node: Place, start_job: StartJob, engine: str) -> None:
    """Checkpoint, kill, remove, restore, and that again with the restored one."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job()
    for turn in range(3):
        reference = f"local/round:{turn}"
        before = job.next_report()
        job.checkpoint_container(reference)
        go_on(before, job.next_report())
        job.end()
        assert board.owners() == {}
        job.restore_container(reference)
        go_on(before, job.next_report())
        unbroken(job)


def test_nothing_is_written_while_paused(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """What is in the root file system at Pause is what goes with the memory. For processes
    without CUDA that holds with the driver engine only: CRIU's plugin has CRIU thaw the container
    before it stops each process, and they may get a turn in between (CRIU 4.2: seize.c)."""
    node, _ = gpu_node
    configure(node, engine=engine)
    still = ["ctx", "cpu"] if engine == "driver" else ["ctx", "ctx"]
    job = start_job("--procs", ",".join(still), "--tick-ms", "1", runtime=honouring(node))
    names = [STATUS, f"{STATUS}.p0", f"{STATUS}.p1"]
    files = [job.rootfs() / name.lstrip("/") for name in names]
    for name in names:
        job.next_report(name)
    job.ctr("task", "pause", job.name)
    paused = [file.read_bytes() for file in files]
    job.save_rootfs(diff_beside(images))
    job.checkpoint_task(images)
    assert job.status() == "PAUSED"
    assert [file.read_bytes() for file in files] == paused
    job.ctr("task", "resume", job.name)
    job.next_report()
    job.end()

    after = restored_by_annotation(start_job, images)
    for name in names:
        after.next_report(name)
        unbroken(after, name)


def test_tree(gpu_node: Place, start_job: StartJob, images: str, engine: str) -> None:
    """Four CUDA processes, one without a context, and one that only maps the library. (That they
    are suspended at once: test_gpu_pause.py.)"""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job("--procs", "ctx,init,ctx,map", "--bytes", str(2 << 20), runtime=honouring(node))
    names = [STATUS, *(f"{STATUS}.p{number}" for number in range(4))]
    marks = [job.next_report(name) for name in names]
    job.checkpoint_task(images)
    assert len(manifest(node, images)["cuda_processes"]) == 4
    for name, mark in zip(names, marks, strict=True):
        go_on(mark, job.next_report(name))
    job.checkpoint_container("local/tree:1")
    job.end()
    job.restore_container("local/tree:1")
    for name, mark in zip(names, marks, strict=True):
        go_on(mark, job.next_report(name))
        if engine == "driver":  # as in the test above
            unbroken(job, name)
    assert sum(board.owners().values()) == 3 * (2 << 20)


def test_terminal(gpu_node: Place, start_job: StartJob, images: str) -> None:
    """A container with a terminal gets a new one when it is restored."""
    node, _ = gpu_node
    configure(node)
    job = start_job(options=["--tty"], runtime=honouring(node))
    before = job.next_report()
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    job.save_rootfs(diff_beside(images))
    job.end()
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    go_on(before, start_job(options=["--tty", note]).next_report())
