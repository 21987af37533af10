"""Encrypted checkpoints on a real node, with a real (simulated-GPU) container."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.gpu import configure, go_on, honouring, restored_by_annotation, until
from tests.e2e.test_gritctl_stored import gritctl
from tests.e2e.test_trust import make_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

KEY = "/etc/grit/encryption.key"


@pytest.mark.parametrize("gpu_node", ["forky"], indirect=True)
def test_encrypted_and_restored(gpu_node: Place, start_job: StartJob, images: str) -> None:
    node, _ = gpu_node
    make_key(node, "any")  # brings `cryptography`
    key = node.path(KEY)
    key.write_text("ab" * 32)
    key.chmod(0o600)
    settings = {"engine": "driver", "lane_from": 4096}
    configure(node, **settings, encryption_key_file=KEY)
    job = start_job(runtime=honouring(node))
    before = job.next_report()
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    job.save_rootfs(images.replace("/checkpoint", "/rootfs-diff.tar"))
    job.end()
    files = {path.name: path.read_bytes() for path in node.path(images).iterdir()}
    assert any(name.startswith("lane-") for name in files)
    assert all(
        data.startswith(b"grit-sealed1") for name, data in files.items() if name != "grit.json"
    )
    assert not any(path.name.startswith(".") for path in node.path(images).parent.iterdir())
    place = images.removesuffix("/checkpoint")
    assert "encrypted (AES-256-GCM" in gritctl(node, "verify", place)
    assert "cannot be shown" in gritctl(node, "show", place)

    bundle = node.path("/run/containerd/io.containerd.runtime.v2.task/default")
    note = f"--annotation=grit.dev/checkpoint={place}"
    for text, said in (("cd" * 32, "the key here is"), ("", "is no key")):
        key.write_text(text)
        refused = start_job(name="again", options=[note], run=False)
        done = refused.try_run()
        assert done.returncode and said in done.stderr
        refused.end()
    key.write_text("ab" * 32)
    again = restored_by_annotation(start_job, images)
    go_on(before, again.next_report())
    assert list(bundle.glob("*/grit-scratch")) == []
    again.checkpoint_task(f"{images}2")  # and runs on, with its memory filled in again
    go_on(before, again.next_report())
    configure(node)
