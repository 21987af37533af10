"""Restored on another GPU than it was checkpointed on: found by type and room, or named by the
user; refused, with the reason, where none fits. A node with two GPUs stands for two nodes."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.e2e.gpu import configure, go_on, honouring, uuid
from tests.e2e.test_gpu_injected import away

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

MIB = 1 << 20


@pytest.fixture(scope="module", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[tuple[Node, SimGpu]]:
    """With two GPUs of one type."""
    cgroup = {"13": "v1", "forky": "v2"}[request.param]
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(request.param, cgroup=cgroup, binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        board = gpu.gpu_of(node, gpus=2, capacity=16 * MIB)
        gpu.kernel_driver(node, "NVIDIA H200", "NVIDIA H200")
        yield node, board


@contextlib.contextmanager
def another_type(node: Node, number: int) -> Iterator[None]:
    """GPU `number` is an L4 meanwhile."""
    file = node.path(f"/proc/driver/nvidia/gpus/0000:{number:02x}:00.0/information")
    text = file.read_text()
    file.write_text(text.replace("H200", "L4"))
    yield
    file.write_text(text)


def restored(
    start_job: StartJob,
    images: str,
    *gpus: int,
    pairs: str = "",
    runtime: str = gpu.GRIT,
    run: bool = True,
) -> Job:
    options = [f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"]
    if pairs:
        options.append(f"--annotation=grit.dev/device-map={pairs}")
    return start_job(gpus=gpus, options=options, runtime=runtime, run=run)


def refused(start_job: StartJob, images: str, *gpus: int, pairs: str = "") -> str:
    """What the client is told; nothing was created."""
    job = restored(start_job, images, *gpus, pairs=pairs, run=False)
    done = job.try_run()
    assert done.returncode != 0
    assert job.status() == ""
    job.end()
    return done.stderr


@pytest.fixture
def checkpointed(gpu_node: Place, start_job: StartJob, images: str) -> Callable[..., Job]:
    """A job that ran on these GPUs, and is in `images` now."""
    node, _ = gpu_node

    def make(*gpus: int, engine: str = "driver", words: tuple[str, ...] = ()) -> Job:
        configure(node, engine=engine)
        job = start_job(*words, gpus=gpus, runtime=honouring(node))
        job.next_report()
        away(job, images)
        return job

    return make


def test_restored_on_the_gpu_it_is_given(
    gpu_node: Place, start_job: StartJob, checkpointed: Callable[..., Job], images: str
) -> None:
    node, board = gpu_node
    checkpointed(0)
    written = json.loads(node.path(f"{images}/grit.json").read_text())
    assert written["gpus"] == [{"uuid": uuid(0), "name": "NVIDIA H200"}]
    job = restored(start_job, images, 1, runtime=honouring(node))
    first = job.next_report()
    assert list(board.owners(1)) == [job.pid()]
    assert board.owners(0) == {}

    # And back, on the GPU of its first life, of which its /dev has kept the file.
    node.run(["rm", "-r", images])
    away(job, images)
    written = json.loads(node.path(f"{images}/grit.json").read_text())
    assert [one["uuid"] for one in written["gpus"]] == [uuid(1)]
    job = restored(start_job, images, 0)
    go_on(first, job.next_report())
    assert list(board.owners(0)) == [job.pid()]
    assert board.owners(1) == {}


def test_of_two_the_one_with_room_is_taken(
    gpu_node: Place, start_job: StartJob, checkpointed: Callable[..., Job], images: str
) -> None:
    _, board = gpu_node
    checkpointed(0)
    other = start_job("--bytes", str(14 * MIB), gpus=(0,), name="other")
    told = refused(start_job, images, 0)
    assert f"NVIDIA H200 ({uuid(0)}) has 2 MiB free, 4 MiB are needed" in told
    job = restored(start_job, images, 0, 1)
    job.next_report()
    assert board.owners(1)[job.pid()] == 4 * MIB
    other.next_report()


def test_the_user_may_name_the_gpu(
    gpu_node: Place, start_job: StartJob, checkpointed: Callable[..., Job], images: str
) -> None:
    _, board = gpu_node
    checkpointed(0)
    told = refused(start_job, images, 0, pairs=f"{uuid(0)}={uuid(1)}")
    assert f"the container was not given {uuid(1)}, but NVIDIA H200 ({uuid(0)})" in told
    told = refused(start_job, images, 1, pairs=f"{uuid(1)}={uuid(1)}")
    assert f"names no successor for {uuid(0)}" in told
    job = restored(start_job, images, 0, 1, pairs=f"{uuid(0)}={uuid(1)}")
    job.next_report()
    assert board.owners(1)[job.pid()] == 4 * MIB


def test_refused_where_type_or_count_does_not_fit(
    gpu_node: Place, start_job: StartJob, checkpointed: Callable[..., Job], images: str
) -> None:
    node, _ = gpu_node
    checkpointed(0)
    with another_type(node, 1):
        told = refused(start_job, images, 1)
        assert f"no GPU for the checkpoint's NVIDIA H200 ({uuid(0)})" in told
        assert f"NVIDIA L4 ({uuid(1)}) is another type" in told
    node.run(["rm", "-r", images])
    checkpointed(0, 1)
    told = refused(start_job, images, 1)
    assert (
        f"no GPU for the checkpoint's NVIDIA H200 ({uuid(0)}): it had 2, the container was" in told
    )
    restored(start_job, images, 0, 1).next_report()


def test_the_plugin_engine_knows_no_other_gpu(
    start_job: StartJob, checkpointed: Callable[..., Job], images: str
) -> None:
    checkpointed(0, engine="plugin")
    told = refused(start_job, images, 1)
    assert "made on other GPUs" in told
    assert 'checkpoint with engine = "driver"' in told
    restored(start_job, images, 0).next_report()
