"""Containers that get their GPU as NVIDIA's toolkit gives it: by a hook that mounts from outside
(legacy mode), by edits that only `create` sees (CDI in nvidia-container-runtime), by containerd's
own CDI. All of it is there again after a restore, though runc knows nothing of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu, nvidia_runtime
from tests.e2e.conftest import running
from tests.e2e.gpu import GRIT, configure, go_on, honouring, until
from tests.e2e.test_gpu_checkpoint import diff_beside
from tests.simgpu.simgpu import KIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]


@pytest.fixture(scope="module", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[tuple[Node, SimGpu]]:
    """With cgroup v1, whose device controller a script can speak to."""
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(request.param, cgroup="v1", binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        board = gpu.gpu_of(node, capacity=16 << 20)
        gpu.kernel_driver(node, "NVIDIA H200")
        nvidia_runtime.install(node, f"{KIT}/lib/libcuda.so.1")
        yield node, board


@pytest.fixture
def start_with_toolkit(gpu_node: Place, start_job: StartJob, engine: str) -> StartJob:
    """Jobs whose client gives them no device: the toolkit does."""
    node, _ = gpu_node
    runtime = honouring(node)
    configure(node, nvidia_runtime.RUNTIME, engine=engine)

    def start(*notes: str, run: bool = True) -> Job:
        env = ["NVIDIA_VISIBLE_DEVICES=0", f"LD_PRELOAD={nvidia_runtime.LINK}"]
        options = [f"--env={entry}" for entry in env] + [*notes]
        if runtime != GRIT:
            options.append(f"--runc-binary={nvidia_runtime.RUNTIME}")
        job = start_job(gpus=(), runtime=runtime, options=options, run=False)
        return job.run() if run else job

    return start


def mounts(job: Job) -> dict[str, tuple[str, str]]:
    """What is mounted where on the driver's account: what of it, and with which flags."""
    found = {}
    for line in _proc(job, "mountinfo").read_text().splitlines():
        fields = line.split()
        if "nvidia" in fields[4] or fields[4].startswith("/proc/driver"):
            found[fields[4]] = (fields[3].removesuffix("//deleted"), fields[5])
    return found


def _proc(job: Job, name: str) -> Path:
    return job.node.path(f"/proc/{job.node_pid()}/{name}")


def maps_library(job: Job) -> bool:
    return nvidia_runtime.LIBRARY in _proc(job, "maps").read_text()


def away(job: Job, images: str) -> None:
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    job.save_rootfs(diff_beside(images))
    job.end()


@pytest.mark.parametrize("mode", ["legacy", "cdi"])
def test_restored_with_what_the_toolkit_gave(
    gpu_node: Place, start_with_toolkit: StartJob, images: str, mode: str
) -> None:
    node, board = gpu_node
    nvidia_runtime.set_mode(node, mode)
    job = start_with_toolkit()
    before, had = job.next_report(), mounts(job)
    assert maps_library(job)
    assert nvidia_runtime.LIBRARY in had
    assert had["/proc/driver/nvidia/params"]
    if mode == "legacy":
        assert {"/dev/nvidia0", "/proc/driver/nvidia/gpus/0000:00:00.0"} <= had.keys()
    away(job, images)
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    restored = start_with_toolkit(note)
    go_on(before, restored.next_report())
    assert maps_library(restored)
    now = mounts(restored)
    params = "/proc/driver/nvidia/params"
    assert now.pop(params)[1] == had.pop(params)[1]
    assert now == had
    seen = _proc(restored, f"root{params}")
    assert seen.read_text() == "ModifyDeviceFiles: 0\n"
    assert sum(board.owners().values()) == 4 << 20

    # And once more: of the restored container runc knows even less.
    node.run(["rm", "-r", images])
    before = restored.next_report()
    away(restored, images)
    go_on(before, start_with_toolkit(note).next_report())


def test_a_host_file_that_is_not_the_drivers_is_not_given(
    gpu_node: Place, start_with_toolkit: StartJob, images: str
) -> None:
    """The manifest says what to mount, and who wrote it is not known."""
    node, _ = gpu_node
    nvidia_runtime.set_mode(node, "cdi")
    job = start_with_toolkit()
    away(job, images)
    manifest = node.path(f"{images}/grit.json")
    written = json.loads(manifest.read_text())
    del written["self_check"], written["sha256_of_the_above"]
    (library,) = [m for m in written["mounts"] if m["path"] == nvidia_runtime.LIBRARY]
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    node.path("/usr/lib/nvidia-link").symlink_to("/etc/shadow")
    for source, why in (
        ("/etc/shadow", "none of the driver's"),
        ("/usr/lib/nvidia-link", "none of the driver's"),  # leads to the same
        ("/usr/lib/libcuda.so.1.2.3", "which this node does not have"),
    ):
        library["source"] = source
        manifest.write_text(json.dumps(written))
        restored = start_with_toolkit(note, run=False)
        done = restored.try_run()
        assert done.returncode != 0
        real = "/etc/shadow" if "link" in source else source
        assert f"{nvidia_runtime.LIBRARY} (was {real}" in done.stderr
        assert why in done.stderr
        restored.end()
    node.path("/usr/lib/nvidia-link").unlink()


def test_containerds_own_cdi(
    gpu_node: Place, start_job: StartJob, images: str, engine: str
) -> None:
    node, board = gpu_node
    if node.containerd_version < (2, 0):
        pytest.skip("ctr 1.7 knows no CDI; a client that does edits the specification itself")
    configure(node, engine=engine)
    specification = {
        "cdiVersion": "0.5.0",
        "kind": "nvidia.com/gpu",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/nvidia0"}]}}],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "mounts": [
                {
                    "hostPath": nvidia_runtime.LIBRARY,
                    "containerPath": nvidia_runtime.LINK,
                    "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"],
                }
            ],
        },
    }
    node.path("/etc/cdi").mkdir(exist_ok=True)
    node.path("/etc/cdi/nvidia.json").write_text(json.dumps(specification))
    options = ["--device=nvidia.com/gpu=0", f"--env=LD_PRELOAD={nvidia_runtime.LINK}"]
    job = start_job(gpus=(), runtime=honouring(node), options=options)
    before, had = job.next_report(), mounts(job)
    assert nvidia_runtime.LINK in had
    away(job, images)
    note = f"--annotation=grit.dev/checkpoint={images.removesuffix('/checkpoint')}"
    restored = start_job(gpus=(), runtime=honouring(node), options=[*options, note])
    go_on(before, restored.next_report())
    assert mounts(restored) == had
    assert sum(board.owners().values()) == 4 << 20
