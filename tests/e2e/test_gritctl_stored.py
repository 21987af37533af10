"""gritctl on checkpoints that lie on disk, whole, damaged and foreign, as an operator types it on a
real node: exact about what is wrong, and never a traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.gpu import configure, honouring
from tests.e2e.marks import on_forky
from tests.e2e.test_gpu_checkpoint import diff_beside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.e2e.gpu import Job
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Place = tuple[Node, SimGpu]
    StartJob = Callable[..., Job]

SAVED = "/var/tmp/saved"
"""Where each node has one checkpoint of a GPU job for all tests here; they work on copies."""

OTHER = "/var/tmp/other"


def gritctl(node: Node, *words: str, status: int = 0, **options: Any) -> str:
    """Runs it in the node; its output and errors. Whatever happens there is no traceback."""
    done = node.run(["gritctl", *words], check=False, timeout=120, **options)
    text = done.stdout + done.stderr
    assert "Traceback" not in text and "a mistake in gritctl" not in text, text
    assert done.returncode == status, f"exit {done.returncode}\n{text}"
    return text


@pytest.fixture
def saved(gpu_node: Place, start_job: StartJob) -> Node:
    """The node, with a checkpoint in SAVED."""
    node, _ = gpu_node
    if not node.path(SAVED).exists():
        configure(node)
        node.path(SAVED).mkdir()
        images = f"{SAVED}/checkpoint"
        job = start_job(runtime=honouring(node))
        job.checkpoint_task(images)
        job.save_rootfs(diff_beside(images))
        job.end()
    return node


@pytest.fixture
def copy(saved: Node) -> Iterator[Path]:
    """The host's path of a copy in OTHER, to be damaged."""
    path = saved.path(OTHER)
    shutil.copytree(saved.path(SAVED), path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_ls_show_and_verify_what_is_whole(saved: Node) -> None:
    listed = gritctl(saved, "ls", "/var/tmp")
    assert f"{SAVED}  job" in listed
    assert "driver" in listed
    shown = gritctl(saved, "show", SAVED)
    for part in ("simgpu-workload", "GPU, as copied to the host", "4.0 MiB", "/run/simgpu"):
        assert part in shown
    document = json.loads(gritctl(saved, "show", "--json", SAVED))
    (one,) = document["containers"]
    assert one["memory"]["device"] == 4 << 20
    assert one["container"] == "job"
    pages = saved.path(f"{SAVED}/checkpoint/pages-1.img").stat().st_size
    assert sum(one["memory"].values()) == pages
    text = gritctl(saved, "verify", SAVED)
    assert "are as they were written. It can be restored on this node." in text
    assert json.loads(gritctl(saved, "verify", "--json", SAVED))["verdict"] == "good"


def damage_truncate(copy: Path) -> str:
    pages = copy / "checkpoint/pages-1.img"
    with open(pages, "r+b") as file:
        file.truncate(pages.stat().st_size - 4096)
    return "pages-1.img: has "


def damage_bit(copy: Path) -> str:
    with open(copy / "checkpoint/pages-1.img", "r+b") as file:
        file.seek(8192)
        byte = file.read(1)[0]
        file.seek(8192)
        file.write(bytes([byte ^ 4]))
    return "pages-1.img: has XXH3 "


def damage_missing(copy: Path) -> str:
    (copy / "checkpoint/core-1.img").unlink()
    return "core-1.img: is missing"


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """As a change by hand: without the checksum of itself."""
    del manifest["self_check"], manifest["sha256_of_the_above"]
    path.write_text(json.dumps(manifest))


def damage_manifest_bit(copy: Path) -> str:
    path = copy / "checkpoint/grit.json"
    path.write_text(path.read_text().replace('"hostname": "', '"hostname": "x', 1))
    return "grit.json: does not match the checksum in its last line"


def damage_version(copy: Path) -> str:
    path = copy / "checkpoint/grit.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 7', 1))
    return "is of format 7, and this grit reads formats 1 to 4"


def damage_manifest(copy: Path) -> str:
    path = copy / "checkpoint/grit.json"
    path.write_bytes(path.read_bytes()[:300])
    return "grit.json: is not valid JSON"


def damage_inventory(copy: Path) -> str:
    (copy / "checkpoint/inventory.img").write_bytes(b"")
    return "inventory.img: has 0 bytes"


def damage_image(copy: Path) -> str:
    path = copy / "checkpoint/mm-1.img"
    path.write_bytes(path.read_bytes()[:-5])
    return "mm-1.img: cut short within a record"


def damage_layer(copy: Path) -> str:
    (copy / "rootfs-diff.tar").write_bytes(b"not a layer" * 99)
    return "rootfs-diff.tar: is no tar archive, or a damaged one"


def damage_spec(copy: Path) -> str:
    (copy / "spec.dump").write_text("{")
    return "spec.dump: cannot be read"


DAMAGES = [
    damage_truncate, damage_bit, damage_missing, damage_version, damage_manifest,
    damage_manifest_bit,    damage_inventory, damage_image, damage_layer, damage_spec,
]  # fmt: skip


@on_forky
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(saved: Node, copy: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(copy)
    text = gritctl(saved, "verify", OTHER, status=3)
    assert expected in text
    assert "do not restore it" in text
    document = json.loads(gritctl(saved, "verify", "--json", OTHER, status=3))
    assert document["verdict"] == "damaged"
    for words in (["show", OTHER], ["show", "--json", OTHER]):
        done = saved.run(["gritctl", *words], check=False)
        assert done.returncode in (0, 3)
        assert "Traceback" not in done.stderr
    gritctl(saved, "ls", "/var/tmp")
    gritctl(saved, "diff", SAVED, OTHER)


def test_foreign_images_are_read_but_not_vouched_for(saved: Node, copy: Path) -> None:
    (copy / "checkpoint/grit.json").unlink()
    (copy / "spec.dump").write_text('{"annotations": {"io.container.manager": "cri-o"}}')
    assert "by CRI-O: it has no checksums" in gritctl(saved, "show", OTHER)
    text = gritctl(saved, "verify", OTHER)
    assert "another tool wrote it" in text and "there are no checksums" in text
    (copy / "checkpoint/pages-1.img").unlink()
    assert "pages-1.img: No such file" in gritctl(saved, "verify", OTHER, status=3)


@pytest.mark.parametrize(
    ("manager", "writer", "packing"),
    [("libpod", "podman", "zstd"), ("cri-o", "CRI-O", ""), ("", "containerd's CRI", "gzip")],
)
def test_archives_of_others(
    saved: Node, copy: Path, manager: str, writer: str, packing: str
) -> None:
    (copy / "checkpoint/grit.json").unlink()
    notes = {"io.container.manager": manager} if manager else {}
    (copy / "spec.dump").write_text(json.dumps({"annotations": notes}))
    (copy / "config.dump").write_text('{"id": "0123abcd", "rootfsImageName": "docker.io/x:1"}')
    if not manager:
        (copy / "status.dump").write_text("{}")
    tar = saved.path("/var/tmp/foreign.tar")
    flags = {"zstd": ["--zstd"], "gzip": ["-z"], "": []}[packing]
    subprocess.run(["tar", *flags, "-cf", tar, "-C", copy, "."], check=True)
    text = gritctl(saved, "show", "/var/tmp/foreign.tar")
    assert f"an archive by {writer}" in text
    assert "0123abcd, image docker.io/x:1" in text
    assert "tar -xf /var/tmp/foreign.tar -C DIR" in text
    assert "not here" in gritctl(saved, "verify", "/var/tmp/foreign.tar", status=4)
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    assert "damaged" in gritctl(saved, "verify", "/var/tmp/foreign.tar", status=3)
    tar.unlink()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere", "/nowhere: there is no such directory"),
        ("/usr", "is not a checkpoint: it has neither checkpoint/ nor CRIU's images"),
        ("/etc/passwd", "neither a checkpoint directory nor a tar archive"),
    ],
)
def test_what_is_no_checkpoint(saved: Node, path: str, words: str) -> None:
    for command in ("show", "verify"):
        assert words in gritctl(saved, command, path, status=1)


def test_not_here(saved: Node, copy: Path) -> None:
    """Whole, but for other GPUs, a later CRIU and a later driver."""
    path = copy / "checkpoint/grit.json"
    manifest = json.loads(path.read_text())
    manifest["criu"] = "9.9"
    manifest["gpus"] = [{"uuid": "GPU-1", "name": "NVIDIA H100"}]
    write_manifest(path, manifest)
    text = gritctl(saved, "verify", OTHER, status=4)
    assert "the images are by 9.9" in text
    assert "it needs 1 GPUs" in text
    assert "It cannot be restored on this node." in text
    gritctl(saved, "verify", "--no-node", OTHER)


def test_diff_names_what_differs(saved: Node, copy: Path) -> None:
    assert "no difference" in gritctl(saved, "diff", SAVED, OTHER)
    path = copy / "checkpoint/grit.json"
    manifest = json.loads(path.read_text())
    manifest["hostname"] = "elsewhere"
    manifest["phases"]["dump"] = 99
    write_manifest(path, manifest)
    text = gritctl(saved, "diff", SAVED, OTHER)
    assert "elsewhere" in text and "1 min 39 s" in text
    changed = json.loads(gritctl(saved, "diff", "--json", SAVED, OTHER))["changed"]
    assert changed["hostname"][1] == "elsewhere"


def test_rm_takes_checkpoints_only(saved: Node, copy: Path) -> None:
    (copy / "thesis.txt").write_text("mine")
    assert "thesis.txt" in gritctl(saved, "rm", OTHER, status=1)
    assert (copy / "checkpoint/grit.json").exists()
    (copy / "thesis.txt").unlink()
    assert "is not a checkpoint" in gritctl(saved, "rm", "/usr", status=1)
    assert "place for several" in gritctl(saved, "rm", "/var/tmp", status=1)
    gritctl(saved, "rm", OTHER)
    assert not copy.exists()


def test_prune_by_rule(saved: Node, copy: Path) -> None:
    place = saved.path("/var/tmp/many")
    for number in range(4):
        shutil.copytree(copy, place / str(number))
        path = place / str(number) / "checkpoint/grit.json"
        manifest = json.loads(path.read_text())
        manifest["created"] = f"2026-01-0{number + 1}T00:00:00Z"
        write_manifest(path, manifest)
    (place / "0/checkpoint/grit.json").write_text("{")
    (place / ".x.grit-partial-0123456789abcdef/checkpoint").mkdir(parents=True)
    words = ["prune", "--keep-last", "1", "/var/tmp/many"]
    assert "would remove /var/tmp/many/1" in gritctl(saved, *words, "--dry-run")
    assert (place / "1").exists()
    assert "2 kept" in gritctl(saved, *words)
    assert sorted(entry.name for entry in place.iterdir()) == ["0", "3"]
    assert "say what to keep" in gritctl(saved, "prune", "/var/tmp/many", status=2)
    assert "is not a time" in gritctl(saved, "prune", "--keep-within", "soon", status=2)
    shutil.rmtree(place)
