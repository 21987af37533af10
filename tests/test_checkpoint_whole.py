"""The layout around image directories: published whole, checked by SHA256SUMS, removed whole."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from random import Random

import pytest

from shim import checkpoint_dir, restore
from shim.checkpoint_dir import CheckpointDirError, Draft
from shim.config import GritOptions
from tests.test_checkpoint_dir import published

DEFAULTS = GritOptions()


def fill(place: Path) -> None:
    place.mkdir(exist_ok=True)
    published(place / "checkpoint")
    (place / "rootfs-diff.tar").write_bytes(b"layer")
    (place / "spec.dump").write_text("{}")


def make(final: Path, *containers: str) -> None:
    draft = Draft.begin(str(final))
    for place in [Path(draft.path, name) for name in containers] or [Path(draft.path)]:
        fill(place)
    draft.publish_whole()


@pytest.mark.parametrize("containers", [(), ("web", "db"), ("checkpoint", "web")])
def test_published_checked_and_removed(tmp_path: Path, containers: tuple[str, ...]) -> None:
    final = tmp_path / "saved"
    make(final, *containers)
    names = [name for name, _ in checkpoint_dir.image_directories(str(final))]
    assert names == (sorted(containers) or [""])
    assert checkpoint_dir.verify_sums(str(final)) == []
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=final, check=True)
    listed = (final / "SHA256SUMS").read_text().splitlines()
    assert len(listed) == 3 * max(1, len(containers))
    assert all(path.stat().st_mode & 0o77 == 0 for path in final.rglob("*"))
    checkpoint_dir.remove(str(final))
    assert list(tmp_path.iterdir()) == []


def test_what_differs_is_named(tmp_path: Path) -> None:
    final = tmp_path / "saved"
    make(final)
    (final / "spec.dump").write_text("[]")
    (final / "rootfs-diff.tar").unlink()
    (final / "checkpoint/grit.json").write_text("{")
    (final / "new").write_text("")
    problems = checkpoint_dir.verify_sums(str(final)) or []
    assert [(one.name, one.kind) for one in problems] == [
        ("checkpoint/grit.json", "checksum"),
        ("new", "extra"),
        ("rootfs-diff.tar", "missing"),
        ("spec.dump", "checksum"),
    ]
    (final / "SHA256SUMS").write_text(f"{'0' * 64}  ../../etc/passwd\n")
    with pytest.raises(CheckpointDirError, match="line 1: is not a checksum"):
        checkpoint_dir.verify_sums(str(final))
    (final / "SHA256SUMS").unlink()
    assert checkpoint_dir.verify_sums(str(final)) is None


def test_nothing_is_written_over(tmp_path: Path) -> None:
    final = tmp_path / "saved"
    draft = Draft.begin(str(final))
    fill(Path(draft.path))
    final.mkdir()
    (final / "mine").write_text("")
    with pytest.raises(CheckpointDirError, match="cannot publish"):
        draft.publish_whole()
    draft.discard()
    assert [path.name for path in final.iterdir()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "empty"):
        path.mkdir(exist_ok=True)
        with pytest.raises(CheckpointDirError, match="is not a checkpoint"):
            checkpoint_dir.remove(str(path))
    make(tmp_path / "a")
    make(tmp_path / "b")
    with pytest.raises(CheckpointDirError, match="place for several"):
        checkpoint_dir.remove(str(tmp_path))
    (tmp_path / "a/thesis").write_text("")
    with pytest.raises(CheckpointDirError, match="no part of a checkpoint: thesis"):
        checkpoint_dir.remove(str(tmp_path / "a"))
    (tmp_path / "b/checkpoint/.grit-partial-0123456789abcdef").mkdir()
    with pytest.raises(CheckpointDirError, match="just being written"):
        checkpoint_dir.remove(str(tmp_path / "b"))
    assert (tmp_path / "a/checkpoint/grit.json").exists()
    assert (tmp_path / "b/checkpoint/grit.json").exists()


def test_drafts_of_the_living_are_not_abandoned(tmp_path: Path) -> None:
    draft = Draft.begin(str(tmp_path / "saved"))
    dead = tmp_path / ".old.grit-partial-0123456789abcdef"
    shutil.copytree(draft.path, dead)
    (tmp_path / ".mine.grit-partial-xyz").mkdir()
    assert checkpoint_dir.abandoned(str(tmp_path)) == [str(dead)]
    draft.discard()


def _places(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _wrong(images: Path, settings: GritOptions = DEFAULTS) -> str:
    """What a restore by annotation says of the checkpoint, "" if it would begin."""
    try:
        restore._verified(str(images), settings, beside=True)
    except checkpoint_dir.CheckpointDirError as error:
        return str(error)
    return ""


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    final = tmp_path / "job"
    make(final)
    return final


def test_a_flipped_bit_anywhere_in_a_checkpoint_stops_its_restore(stored: Path) -> None:
    """200 bits, each byte of the images, the manifest, the diff, the log and the sums as likely."""
    images = stored / "checkpoint"
    assert _wrong(images) == ""
    files = _places(stored)
    random = Random(7)
    sizes = [path.stat().st_size for path in files]
    met = set()
    # One in every file first, so that none is left out by chance.
    chosen = [path for path in files if path.stat().st_size]
    chosen += random.choices(files, sizes, k=200 - len(chosen))
    for path in chosen:
        was = path.read_bytes()
        at = random.randrange(len(was))
        flipped = bytearray(was)
        flipped[at] ^= 1 << random.randrange(8)
        path.write_bytes(flipped)
        said = _wrong(images)
        if path.name in ("config.dump", "spec.dump", "SHA256SUMS", "grit.json"):
            assert said, f"{path}, byte {at}"
        else:
            assert path.name in said, f"{path}, byte {at}"
        path.write_bytes(was)
        met.add(path.name)
    assert {"grit.json", "SHA256SUMS", "inventory.img", "rootfs-diff.tar"} <= met
    assert _wrong(images) == ""


def test_what_is_missing_swapped_or_added_beside_stops_a_restore(stored: Path) -> None:
    images, diff = stored / "checkpoint", stored / "rootfs-diff.tar"
    was = diff.read_bytes()
    diff.unlink()
    assert "rootfs-diff.tar: is missing" in _wrong(images)
    diff.write_bytes(b"another layer")
    assert "rootfs-diff.tar: has SHA-256 " in _wrong(images)
    diff.write_bytes(was)
    sums = stored / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "rootfs-diff" not in line))
    assert "rootfs-diff.tar: is not in SHA256SUMS" in _wrong(images)
    sums.unlink()
    assert _wrong(images) == ""  # as clients other than gritctl leave it


def test_a_pods_container_is_checked_by_the_pods_sums(tmp_path: Path) -> None:
    final = tmp_path / "pod"
    make(final, "web", "db")
    assert _wrong(final / "web/checkpoint") == ""
    (final / "web/rootfs-diff.tar").write_bytes(b"another")
    assert "web/rootfs-diff.tar: has SHA-256 " in _wrong(final / "web/checkpoint")
    assert _wrong(final / "db/checkpoint") == ""


def test_what_others_may_write_is_not_restored(stored: Path) -> None:
    images = stored / "checkpoint"
    for path in (images, images / "inventory.img", stored / "rootfs-diff.tar"):
        mode = path.stat().st_mode
        path.chmod(mode | 0o002)
        said = _wrong(images)
        assert path.name in said and "chmod go-w" in said
        path.chmod(mode)
    assert _wrong(images) == ""
    os.chown(images / "inventory.img", 4711, 0)
    assert "inventory.img: belongs to the user 4711" in _wrong(images)
