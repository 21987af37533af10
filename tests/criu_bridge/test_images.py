"""Image files as CRIU lays them out: magics, lengths, records."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from shim.criu_bridge import images
from shim.protowire import Message


def image(magics: tuple[int, ...], *records: Message) -> bytes:
    parts = [struct.pack(f"<{len(magics)}I", *magics)]
    for record in records:
        data = record.encode()
        parts.append(struct.pack("<I", len(data)) + data)
    return b"".join(parts)


INVENTORY = (0x58313116,)
PSTREE = (0x54564319, 0x50273030)
STATS = (0x55105940, 0x57093306)


def test_plugins_are_listed_or_unknown(tmp_path: Path) -> None:
    path = tmp_path / "inventory.img"
    listed = images.Inventory(img_version=1, plugins=images.Plugins(names=["cuda_plugin"]))
    path.write_bytes(image(INVENTORY, listed))
    assert images.plugins(str(tmp_path)) == [images.CUDA_PLUGIN]
    path.write_bytes(image(INVENTORY, images.Inventory(img_version=1, plugins=images.Plugins())))
    assert images.plugins(str(tmp_path)) == []
    path.write_bytes(image(INVENTORY, images.Inventory(img_version=1)))
    assert images.plugins(str(tmp_path)) is None


def test_process_tree() -> None:
    tree = [
        images.Process(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 9]),
        images.Process(pid=6, ppid=1, pgid=1, sid=1, threads=[6]),
    ]
    assert images.parse_pstree(image(PSTREE, *tree)) == tree


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "cut short"),
        (image((0x1234,)), "magic 0x1234"),
        (image(INVENTORY, images.Inventory(img_version=1))[:-1], "cut short within a record"),
        (image(INVENTORY), "this has 0"),
        (image(INVENTORY) + struct.pack("<I", 1) + b"\xff", "not a record"),
    ],
)
def test_broken_inventory(data: bytes, complaint: str) -> None:
    with pytest.raises(images.ImageError, match=complaint):
        images.parse_inventory(data)


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(images.ImageError, match=r"no readable inventory\.img"):
        images.inventory(str(tmp_path))
    with pytest.raises(images.ImageError, match="no files"):
        images.sizes(str(tmp_path))


def test_sizes(tmp_path: Path) -> None:
    for name, size in {"pages-1.img": 4096, "pages-2.img": 8192, "core-1.img": 10}.items():
        (tmp_path / name).write_bytes(b"x" * size)
    sizes = images.sizes(str(tmp_path))
    assert (sizes.total_bytes, sizes.page_bytes) == (12298, 12288)
    assert (sizes.biggest, sizes.biggest_bytes) == ("pages-2.img", 8192)
