"""Checkpoints that somebody else had in their hands: signed ones, and what is restored from where,
on a real node with a real (simulated-GPU) container."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import cryptography
import pytest

from shim import restore
from shim.checkpoint_dir import CheckpointDirError
from shim.config import GritOptions
from tests.e2e.gpu import configure, go_on
from tests.e2e.marks import on_forky
from tests.e2e.test_gritctl_stored import gritctl
from tests.nodes.installed import ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

PLACE = "/var/lib/checkpoints"
DIR = f"{PLACE}/job"
KEYS = "/etc/grit"

pytestmark = on_forky


@pytest.fixture
def node(gpu_node: Place) -> Iterator[Node]:
    node, _ = gpu_node
    yield node
    configure(node)
    for path in (PLACE, KEYS):
        shutil.rmtree(node.path(path), ignore_errors=True)


def make_key(node: Node, name: str) -> tuple[str, str]:
    """An Ed25519 key pair by openssl, and what reads it; the paths of its halves in the node."""
    (packages,) = node.path(f"{ENVIRONMENT}/lib").glob("python3*/site-packages")
    source = Path(cryptography.__file__).parent
    shutil.copytree(source, packages / "cryptography", dirs_exist_ok=True)
    private, public = node.path(f"{KEYS}/{name}.pem"), node.path(f"{KEYS}/{name}.pub")
    private.parent.mkdir(exist_ok=True)
    for words in (
        ["genpkey", "-algorithm", "ed25519", "-out", private],
        ["pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *words], check=True)
    private.chmod(0o600)
    return f"{KEYS}/{name}.pem", f"{KEYS}/{name}.pub"


def libc(node: Node, call: str) -> None:
    node.run(["python3", "-c", f"import ctypes, sys; sys.exit(ctypes.CDLL(None).{call})"])


def annotated(start_job: StartJob, directory: str = DIR) -> Job:
    """A container that is to be restored from the directory, not run yet."""
    options = [f"--annotation=grit.dev/checkpoint={directory}"]
    return start_job(name="again", options=options, run=False)


def refusal(job: Job) -> str:
    """What was said; no process of the container has been there."""
    done = job.try_run()
    assert done.returncode != 0
    assert job.status() == ""
    job.end()
    return done.stderr


def test_only_what_is_signed_is_restored(node: Node, start_job: StartJob) -> None:
    private, public = make_key(node, "ops")
    _, other = make_key(node, "other")
    configure(node, sign_key=private, verify_keys=[public])
    job = start_job()
    before = job.next_report()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    job.checkpoint_container("local/signed:1")
    job.end()

    text = gritctl(node, "verify", DIR)
    assert f"signed by {public} (ed25519 " in text
    assert "which is none of verify_keys" in gritctl(node, "verify", "--key", other, DIR, status=3)
    assert "which nobody checked" in gritctl(node, "verify", "--no-node", DIR)

    # By each way: the annotation, gritctl, and ctr's own with the images in its content store.
    again = annotated(start_job).run()
    go_on(before, again.next_report())
    again.end()
    start_job(name="again", run=False)
    gritctl(node, "restore", DIR, "--name", "again")
    go_on(before, again.next_report())
    again.end()
    go_on(before, job.restore_container("local/signed:1").next_report())
    job.end()

    configure(node, verify_keys=[other])
    assert "which is none of verify_keys" in refusal(annotated(start_job))
    assert "none of verify_keys" in gritctl(node, "restore", DIR, "--name", "again", status=1)
    done = job.ctr("container", "restore", "--live", job.name, "local/signed:1", check=False)
    assert done.returncode and "which is none of verify_keys" in done.stderr
    job.end()

    # A specification with all rights, and the sums made right again.
    configure(node, verify_keys=[public])
    spec = node.path(f"{DIR}/spec.dump")
    was = spec.read_text()
    assert "CAP_CHOWN" in was
    spec.write_text(was.replace("CAP_CHOWN", "CAP_SYS_ADMIN"))
    sums = node.path(f"{DIR}/SHA256SUMS")
    digest = hashlib.sha256(was.encode()).hexdigest()
    sums.write_text(sums.read_text().replace(digest, hashlib.sha256(spec.read_bytes()).hexdigest()))
    node.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=DIR)
    said = gritctl(node, "restore", DIR, "--name", "again", status=1)
    assert "SHA256SUMS: was changed after it was signed" in said
    assert "SHA256SUMS: was changed after it was signed" in refusal(annotated(start_job))
    assert "was changed after it was signed" in gritctl(node, "verify", DIR, status=3)


def test_a_key_that_cannot_be_used_stops_a_checkpoint_before_it_begins(
    node: Node, gpu_node: Place, start_job: StartJob
) -> None:
    configure(node, sign_key=f"{KEYS}/none.pem")
    job = start_job()
    done = job.checkpoint_task(f"{PLACE}/checkpoint", check=False)
    assert "/etc/grit/none.pem cannot be read: No such file" in done.stderr
    assert "cannot be read" in gritctl(node, "checkpoint", "job", "--to", DIR, status=1)
    assert "sign_key" in gritctl(node, "doctor", status=3)
    assert job.status() == "RUNNING"
    job.next_report()
    assert not node.path(DIR).exists()


def test_checkpoints_are_restored_from_beneath_the_roots_only(
    node: Node, start_job: StartJob
) -> None:
    configure(node)
    job = start_job()
    before = job.next_report()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    job.end()

    configure(node, checkpoint_roots=[PLACE], on_missing_checkpoint="fail")
    go_on(before, annotated(start_job).run().next_report())
    annotated(start_job).end()
    node.path(f"{PLACE}/link").symlink_to("job")
    assert "link is a symbolic link" in refusal(annotated(start_job, f"{PLACE}/link"))
    assert "leads out of the root" in refusal(annotated(start_job, f"{PLACE}/../checkpoints/job"))
    assert "names no checkpoint" in refusal(annotated(start_job, f"{PLACE}/none"))
    images = node.path(f"{DIR}/checkpoint")
    images.rename(node.path(f"{PLACE}/moved"))
    images.symlink_to("../moved")
    assert "checkpoint is a symbolic link" in refusal(annotated(start_job))
    images.unlink()
    node.path(f"{PLACE}/moved").rename(images)

    configure(node, checkpoint_roots=["/var/lib/other"])
    assert "does not lie beneath any of checkpoint_roots" in refusal(annotated(start_job))
    assert "does not lie beneath" in gritctl(node, "verify", DIR, status=4)
    said = gritctl(node, "restore", DIR, "--name", "again", status=1)
    assert "does not lie beneath any of checkpoint_roots" in said
    node.run(["mkdir", "/var/lib/other"])
    libc(node, f"mount(b'{PLACE}', b'/var/lib/other', None, 4096, None)")  # MS_BIND
    try:
        go_on(before, annotated(start_job, "/var/lib/other/job").run().next_report())
        annotated(start_job).end()
    finally:
        libc(node, "umount2(b'/var/lib/other', 0)")
        node.run(["rmdir", "/var/lib/other"])


def test_storage_that_takes_root_for_nobody(node: Node, start_job: StartJob) -> None:
    """NFS with root_squash: all that root writes there belongs to 65534."""
    configure(node)
    job = start_job()
    before = job.next_report()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    job.end()
    node.run(["chown", "-R", "65534:65534", DIR])
    assert "trusted_uids" in refusal(annotated(start_job))
    assert "trusted_uids" in gritctl(node, "restore", DIR, "--name", "again", status=1)
    configure(node, trusted_uids=[65534], checkpoint_roots=[PLACE])
    go_on(before, annotated(start_job).run().next_report())


@contextlib.contextmanager
def damaged(path: Path, at: int, bit: int) -> Iterator[None]:
    """One bit of a file is another meanwhile."""
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, at)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), bytes([byte]), at)


def verdict(node: Node) -> str:
    """What a restore by annotation would say of DIR, "" if it would begin: the very function."""
    try:
        restore._verified(str(node.path(f"{DIR}/checkpoint")), GritOptions(), beside=True)
    except CheckpointDirError as error:
        return str(error)
    return ""


def test_damage_anywhere_is_met_before_a_process_runs(node: Node, start_job: StartJob) -> None:
    """200 single bits of a real checkpoint, each byte of it as likely and each file at least once;
    then files cut short, swapped and missing; some of it all the way through containerd."""
    configure(node)
    job = start_job()
    before = job.next_report()
    gritctl(node, "checkpoint", "job", "--to", DIR)
    job.end()
    assert verdict(node) == ""

    random = Random(20261128)
    files = sorted(path for path in node.path(DIR).rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    chosen = [path for path, size in zip(files, sizes, strict=True) if size]
    chosen += random.choices(files, sizes, k=200 - len(chosen))
    for path in chosen:
        at, bit = random.randrange(path.stat().st_size), random.randrange(8)
        with damaged(path, at, bit):
            said = verdict(node)
        # A digest or a name in SHA256SUMS that is another one says so of the file it speaks of.
        assert path.name in said or (path.name == "SHA256SUMS" and said), (path.name, at, bit, said)
    assert verdict(node) == ""

    images = node.path(f"{DIR}/checkpoint")
    pages, core = images / "pages-1.img", images / "core-1.img"
    for path in (pages, core, images / "grit.json", images.parent / "rootfs-diff.tar"):
        with damaged(path, path.stat().st_size // 2, 3):
            assert path.name in refusal(annotated(start_job))
    was = pages.read_bytes()
    os.truncate(pages, len(was) - 1)
    assert "pages-1.img: has" in verdict(node)
    assert "pages-1.img: has" in refusal(annotated(start_job))
    pages.unlink()
    assert "pages-1.img: is missing" in refusal(annotated(start_job))
    pages.write_bytes(was)
    mm = images / "mm-1.img"
    swapped = mm.read_bytes(), core.read_bytes()
    core.write_bytes(swapped[0])
    mm.write_bytes(swapped[1])
    said = refusal(annotated(start_job))
    assert "mm-1.img: has" in said and f"{core.name}: has" in said
    mm.write_bytes(swapped[0])
    core.write_bytes(swapped[1])
    go_on(before, annotated(start_job).run().next_report())
