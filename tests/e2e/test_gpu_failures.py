"""What goes wrong while a GPU container is checkpointed or restored, and what becomes of it: the
client is told why, the job goes on with its GPU, the next attempt works, nothing is left behind."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import configure, go_on, honouring, restored_by_annotation
from tests.e2e.marks import on_forky
from tests.simgpu import simgpu

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]


def fails(job: Job, images: str, **options: bool) -> str:
    """What the client is told of a checkpoint that fails, the job none the worse for it."""
    before = job.next_report()
    done = job.checkpoint_task(images, check=False)
    assert done.returncode != 0
    assert job.status() == "RUNNING"
    assert job.gpu.library.state(job.pid()) == (simgpu.SUCCESS, simgpu.RUNNING)
    go_on(before, job.next_report())
    place = job.node.path(images).parent
    assert [entry.name for entry in place.rglob("*") if entry.is_file()] == []
    assert not list(place.glob(".*"))
    return done.stderr


def works(job: Job, images: str) -> None:
    before = job.next_report()
    job.checkpoint_task(images)
    go_on(before, job.next_report())


@on_forky
def test_lock_never_granted(gpu_node: Place, start_job: StartJob, images: str, engine: str) -> None:
    node, board = gpu_node
    configure(node, engine=engine, lock_timeout=1)
    job = start_job(runtime=honouring(node))
    with board.faulty("lock=never"):
        told = fails(job, images)
    assert f"pid {job.node_pid()}" in told
    assert "not locked within 1 s" in told
    works(job, images)


@pytest.mark.parametrize("fault", ["checkpoint=304"])
def test_copy_fails(
    gpu_node: Place, start_job: StartJob, images: str, engine: str, fault: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    with board.faulty(fault):
        told = fails(job, images)
    assert f"pid {job.node_pid()}" in told
    works(job, images)


def test_one_of_several_fails(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """The others are given their GPU back, too."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job("--procs", "ctx,ctx", "--bytes", str(1 << 20), runtime=honouring(node))
    names = ["/status.p0", "/status.p1"]
    for name in names:
        job.next_report(name)
    others = [pid for pid in board.owners() if pid != job.pid()]
    board.fault("checkpoint=304", pid=others[0])
    fails(job, images)
    assert {board.library.state(pid) for pid in board.owners()} == {
        (simgpu.SUCCESS, simgpu.RUNNING)
    }
    for name in names:
        job.next_report(name)
    board.end_faults()
    works(job, images)


@contextlib.contextmanager
def tmpfs(node: Node, where: str, size: str) -> Iterator[None]:
    """A small file system of its own in the node, which has no mount command."""
    libc = "import ctypes, os, sys; libc = ctypes.CDLL(None, use_errno=True);"
    libc += "words = [word.encode() for word in sys.argv[1:]];"
    mount = f"{libc} sys.exit(libc.mount(b'tmpfs', words[0], b'tmpfs', 0, words[1]) and 1)"
    umount = f"{libc} sys.exit(libc.umount2(words[0], 0) and 1)"
    node.path(where).mkdir(exist_ok=True)
    node.run(["python3", "-c", mount, where, f"size={size}"])
    try:
        yield
    finally:
        node.run(["python3", "-c", umount, where])


def test_image_directory_full(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """It is a mount point, besides: the draft lies within, and goes when it fails. There is room
    for the bytes, so that nothing is said beforehand, but not for so many files."""
    node, _ = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    with tmpfs(node, images, "64m,nr_inodes=12"):
        told = fails(job, images)
        assert "is full" in told
    with tmpfs(node, images, "64m"):
        works(job, images)
        assert node.path(f"{images}/inventory.img").exists()


@on_forky
def test_image_directory_not_empty(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, _ = gpu_node
    configure(node)
    job = start_job(runtime=honouring(node))
    works(job, images)
    job.remove_checkpoints()
    inventory = node.path(f"{images}/inventory.img")
    written = inventory.stat()
    before = job.next_report()
    done = job.checkpoint_task(images, check=False)
    assert done.returncode != 0
    assert f"{images}: it is not empty" in done.stderr
    assert inventory.stat() == written
    go_on(before, job.next_report())


@on_forky
@pytest.mark.parametrize("damage", ["flip", "remove", "cut"])
def test_damaged_images_are_refused(
    gpu_node: Place, start_job: StartJob, images: str, damage: str
) -> None:
    node, _ = gpu_node
    configure(node)
    job = start_job(runtime=honouring(node))
    job.checkpoint_task(images, "--exit")
    job.end()
    pages = next(node.path(images).glob("pages-*.img"))
    match damage:
        case "flip":
            with open(pages, "r+b") as file:
                file.seek(-1, 2)
                byte = file.read(1)[0]
                file.seek(-1, 2)
                file.write(bytes([byte ^ 1]))
        case "remove":
            pages.unlink()
        case "cut":
            with open(pages, "r+b") as file:
                file.truncate(pages.stat().st_size - 1)
    told = refused(start_job, images)
    assert pages.name in told
    assert "was not restored" in told


def refused(start_job: StartJob, images: str) -> str:
    """What the client is told of a restore that fails; nothing of it is running then."""
    job = restored_by_annotation(start_job, images, run=False)
    done: subprocess.CompletedProcess[str] = job.try_run()
    assert done.returncode != 0
    assert job.status() in ("", "STOPPED")
    assert job.gpu.owners() == {}
    assert not [words for words in job.node.processes().values() if simgpu.WORKLOAD in words]
    job.end()
    return done.stderr


@pytest.mark.parametrize("fault", ["restore=failed", "unlock=304"])
def test_restore_fails(
    gpu_node: Place, start_job: StartJob, images: str, engine: str, fault: str
) -> None:
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    job.checkpoint_task(images, "--exit")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()
    with board.faulty(fault):
        told = refused(start_job, images)
    assert {"driver": "OPERATING_SYSTEM", "plugin": "cuda_plugin"}[engine] in told
    (log,) = node.path("/var/log/containerd-shim-grit").iterdir()
    assert str(log.name) in told
    log.unlink()
    go_on(before, restored_by_annotation(start_job, images).next_report())


def test_restore_by_ctr_fails(gpu_node: Place, start_job: StartJob, engine: str) -> None:
    """ctr leaves the task behind, as it does under the stock shim: it must be dead."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job()
    before = job.next_report()
    job.checkpoint_container("local/gpu:1")
    job.end()
    words = ["container", "restore", "--live", "--rw", job.name, "local/gpu:1"]
    with board.faulty("restore=failed"):
        done = job.ctr(*words, check=False)
    assert done.returncode != 0
    assert job.status() in ("STOPPED", "CREATED")  # killed by us, or never come up
    assert board.owners() == {}
    assert not [words for words in node.processes().values() if simgpu.WORKLOAD in words]
    (log,) = node.path("/var/log/containerd-shim-grit").iterdir()
    assert str(log.name) in done.stderr
    log.unlink()
    job.ctr("task", "delete", job.name, check=False)
    job.ctr("container", "delete", job.name)
    go_on(before, job.restore_container("local/gpu:1").next_report())


def test_restore_without_room(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    """Another job has taken the device memory meanwhile."""
    node, board = gpu_node
    configure(node, engine=engine)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    job.checkpoint_task(images, "--exit")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()
    other = start_job("--bytes", str(14 << 20), name="other")
    done = restored_by_annotation(start_job, images, run=False).try_run()
    assert done.returncode != 0
    assert "OUT_OF_MEMORY" in done.stderr
    assert list(board.owners()) == [other.pid()]
    job.end()
    other.end()
    go_on(before, restored_by_annotation(start_job, images).next_report())
