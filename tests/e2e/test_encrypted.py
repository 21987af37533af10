"""Encrypted checkpoints on a real node, of a real container with a simulated GPU. What goes wrong
in the middle of one: tests/matrix/test_encrypted.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import cryptography
import pytest

from tests.e2e.gpu import GRIT, configure, go_on, honouring, restored_by_annotation, until
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_checkpoint import diff_beside
from tests.e2e.test_gritctl_stored import gritctl
from tests.nodes.installed import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

KEY = "/etc/grit/encryption.key"
PLAIN = {"engine": "driver", "lane_from": 4096}
SETTINGS = {**PLAIN, "encryption_key_file": KEY}
BUNDLES = "/run/containerd/io.containerd.runtime.v2.task/default"
TOKEN = "a-password-in-the-environment"

pytestmark = on_forky


def give_key(node: Node) -> Path:
    """The host's path of the node's key, which is made now, with what reads it."""
    (packages,) = node.path(f"{ENVIRONMENT}/lib").glob("python3*/site-packages")
    source = Path(cryptography.__file__).parent
    shutil.copytree(source, packages / "cryptography", dirs_exist_ok=True)
    key = node.path(KEY)
    key.parent.mkdir(exist_ok=True)
    key.write_text("ab" * 32)
    key.chmod(0o600)
    return key


@pytest.fixture
def key(gpu_node: Place) -> Iterator[Path]:
    node, _ = gpu_node
    yield give_key(node)
    configure(node)
    shutil.rmtree(node.path(KEY).parent)


def in_the_clear(node: Node) -> list[str]:
    """What of decrypted or yet to be encrypted images is there."""
    return [str(path) for path in node.path(BUNDLES).glob("*/.grit-partial-*")]


def found(secrets: list[bytes], directory: Path) -> list[bytes]:
    """Which of the secrets some file in the directory has."""
    files = [path.read_bytes() for path in directory.rglob("*") if path.is_file()]
    assert files
    return [secret for secret in secrets if any(secret in data for data in files)]


def test_no_secret_lies_there_and_all_comes_back(
    gpu_node: Place, start_job: StartJob, images: str, key: Path
) -> None:
    node, _ = gpu_node
    place = images.removesuffix("/checkpoint")
    plain = f"{place}/before/checkpoint"
    node.path(plain).parent.mkdir()
    configure(node, **PLAIN)
    job = start_job(runtime=honouring(node), options=[f"--env=PASSWORD={TOKEN}"])
    before = job.next_report()
    job.checkpoint_task(plain)
    job.save_rootfs(diff_beside(plain))
    job.end()
    lane = max(node.path(plain).glob("lane-*"), key=lambda path: path.stat().st_size)
    device = lane.read_bytes()[1 << 20 :][:32]
    # Each tick adds one to each of its words of 8 bytes, whose upper ones so stay what they are.
    secrets = [TOKEN.encode(), *(device[at + 2 : at + 8] for at in range(0, 32, 8))]
    assert len(set(secrets)) == 5
    assert found(secrets, node.path(plain)) == secrets

    configure(node, **SETTINGS)
    job = restored_by_annotation(start_job, plain, runtime=honouring(node))
    shutil.rmtree(node.path(plain).parent)
    job.checkpoint_task(images, "--exit")
    until("the container's end", lambda: job.status() == "STOPPED")
    assert found(secrets, node.path(images).parent) == []
    assert in_the_clear(node) == []
    job.save_rootfs(diff_beside(images))
    job.end()
    assert "encrypted (AES-256-GCM" in gritctl(node, "verify", place)
    assert "cannot be shown" in gritctl(node, "show", place)
    again = restored_by_annotation(start_job, images, runtime=honouring(node))
    go_on(before, again.next_report())
    assert in_the_clear(node) == []


def test_by_ctr(gpu_node: Place, start_job: StartJob, key: Path) -> None:
    """`ctr container checkpoint` packs the encrypted files into an image of containerd's."""
    node, _ = gpu_node
    compressed = {"lane_compression": "lz4"}
    configure(node, **PLAIN, **compressed, encryption_key_command=["/bin/cat", KEY])
    job = start_job(runtime=GRIT)
    before = job.next_report()
    job.checkpoint_container("local/saved:1")
    job.end()
    key.unlink()
    refused = job.ctr("container", "restore", "--live", job.name, "local/saved:1", check=False)
    assert "encryption_key_command /bin/cat failed with status 1: cat: " in refused.stderr
    assert job.status() == ""
    job.end()
    give_key(node)
    job.restore_container("local/saved:1")
    go_on(before, job.next_report())
    assert in_the_clear(node) == []
