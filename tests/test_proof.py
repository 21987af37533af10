"""Images that lack a process's device memory are told from those that hold it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim import proof
from shim.criu_bridge import images
from shim.cuda import discovery, states
from shim.cuda.suspension import Process
from tests.criu_bridge.test_images import image

MIB = 1 << 20
PAGEMAP = (0x54564319, 0x56084025)
BASE = 0x7F0000000000
ME = os.getpid()


def entry(start: int, size: int, flags: int = 4) -> images.PagemapEntry:
    return images.PagemapEntry(vaddr=start, nr_pages=size // 4096, flags=flags)


def write(directory: Path, *entries: images.PagemapEntry, pid: int = 7) -> None:
    head = images.PagemapHead(pages_id=3)
    (directory / f"pagemap-{pid}.img").write_bytes(image(PAGEMAP, head, *entries))


def process(held: int | None = 8 * MIB, region: int = 9 * MIB, before: str = "running") -> Process:
    return Process(
        ME,
        1,
        (7,),
        "trainer",
        before=before,
        held_bytes=held,
        region=(BASE, BASE + region) if region else None,
        device_bytes=region,
    )


def test_the_images_say_which_file_holds_how_much(tmp_path: Path) -> None:
    write(
        tmp_path,
        entry(0x1000, MIB),
        entry(BASE - MIB, 3 * MIB),  # over its beginning: two are within
        entry(BASE + 4 * MIB, 2 * MIB),
        entry(BASE + 6 * MIB, MIB, flags=1),  # in a parent's image: not in this one
        entry(BASE + 8 * MIB, 3 * MIB),  # over its end: one is within
    )
    one = process()
    proof.require([one], str(tmp_path), {})
    assert (one.image, one.image_bytes) == ("pages-3.img", 5 * MIB)


def test_large_counts_of_either_field_are_understood() -> None:
    large = images.PagemapEntry(vaddr=BASE, nr_pages=1 << 33, flags=4)
    small = images.PagemapEntry(vaddr=BASE, nr_pages_32=2, flags=4)
    for record, bytes_ in ((large, 1 << 45), (small, 8192)):
        data = image(PAGEMAP, images.PagemapHead(pages_id=1), record)
        assert images.parse_pagemap(data, [(BASE, BASE + (1 << 46))]) == ("pages-1.img", bytes_)


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (process(), "the copy is 9.0 MiB at 7f0000000000-7f0000900000, and pages-3.img holds 3.0"),
        (process(region=0), "NVML said 8.0 MiB in use, but no memory appeared in the process"),
        (process(held=None, region=128 * MIB), "and pages-3.img holds 3.0 MiB of it"),
    ],
)
def test_a_dump_without_it_is_refused(tmp_path: Path, one: Process, why: str) -> None:
    write(tmp_path, entry(BASE, 3 * MIB))
    with pytest.raises(proof.NotInImages, match=f"pid {ME} \\(trainer\\): .*{why}"):
        proof.require([one], str(tmp_path), {})


@pytest.mark.parametrize(
    "one",
    [
        process(held=0, region=1 * MIB),  # CUDA without a context
        process(held=None, region=0),  # nothing is known
        process(held=None, region=4 * MIB),
        process(before=states.CHECKPOINTED, region=0),
    ],
)
def test_what_held_nothing_needs_nothing(tmp_path: Path, one: Process) -> None:
    write(tmp_path)
    proof.require([one], str(tmp_path), {})


def test_every_process_is_looked_at(tmp_path: Path) -> None:
    write(tmp_path, entry(BASE, 9 * MIB))
    write(tmp_path, pid=8)
    other = process()
    other.inner, other.comm = (8,), "other"
    with pytest.raises(proof.NotInImages, match=r"the device memory: pid \d+ \(other\): "):
        proof.require([process(), other], str(tmp_path), {})


def test_the_plugins_copy_is_what_appeared_during_the_dump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = process(region=0)
    monkeypatch.setattr(discovery, "anonymous_memory", lambda pid: [(0x1000, 0x2000)])
    before = proof.memory_of([one])
    after = [(0x1000, 0x2000), (BASE, BASE + 8 * MIB), (BASE + 9 * MIB, BASE + 10 * MIB)]
    monkeypatch.setattr(discovery, "anonymous_memory", lambda pid: after)
    write(tmp_path, entry(BASE, 8 * MIB))
    proof.require([one], str(tmp_path), before)
    assert one.region == (BASE, BASE + 8 * MIB)
    assert one.device_bytes == one.image_bytes == 8 * MIB
    write(tmp_path, entry(0x1000, 4096))
    with pytest.raises(proof.NotInImages):
        proof.require([one], str(tmp_path), before)


def test_a_process_that_is_not_in_the_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(images.ImageError, match=r"no readable pagemap-7\.img"):
        proof.require([process()], str(tmp_path), {})
