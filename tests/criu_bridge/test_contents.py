"""What images hold, on images made here field by field."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest

from shim.criu_bridge import contents, images
from shim.protowire import Message
from tests.criu_bridge.test_images import image

COMMON = 0x54564319
PAGE = 4096


def write(directory: Path, name: str, magic: int, *records: Message) -> None:
    (directory / name).write_bytes(image((COMMON, magic), *records))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    inventory = images.Inventory(img_version=1, plugins=images.Plugins(names=["cuda_plugin"]))
    (tmp_path / "inventory.img").write_bytes(image((0x58313116,), inventory))
    tree = [
        images.Process(pid=1, ppid=0, threads=[1, 5]),
        images.Process(pid=7, ppid=1, threads=[7]),
    ]
    write(tmp_path, "pstree.img", 0x50273030, *tree)
    task = contents.TaskCore(task_state=1, comm="trainer")
    write(tmp_path, "core-1.img", 0x55053847, contents.Core(tc=task))
    dead = contents.TaskCore(task_state=2, comm="sh")
    write(tmp_path, "core-7.img", 0x55053847, contents.Core(tc=dead))
    heap = contents.Vma(start=0x10000, end=0x20000, status=1 | 1 << 5 | 1 << 9)
    private = contents.Vma(start=0x20000, end=0x40000, status=1 | 1 << 9)
    library = contents.Vma(start=0x50000, end=0x60000, status=1 | 1 << 6)
    stack = contents.Vma(start=0x70000, end=0x80000, status=1 | 1 << 1 | 1 << 9)
    mm = contents.Mm(vmas=[private, heap, stack, library])
    write(tmp_path, "mm-1.img", 0x57492820, mm)
    entries = [
        images.PagemapHead(pages_id=3),
        images.PagemapEntry(vaddr=0x1F000, nr_pages=5, flags=4),  # across two areas
        images.PagemapEntry(vaddr=0x50000, nr_pages_32=2),
        images.PagemapEntry(vaddr=0x52000, nr_pages=9, flags=1),  # lies in the parent's images
        images.PagemapEntry(vaddr=0x7F000, nr_pages=1, flags=4),
    ]
    write(tmp_path, "pagemap-1.img", 0x56084025, *entries)
    shared = [images.PagemapHead(pages_id=4), images.PagemapEntry(vaddr=0, nr_pages=6)]
    write(tmp_path, "pagemap-shmem-12.img", 0x56084025, *shared)
    return tmp_path


def test_memory_is_told_apart_by_kind(directory: Path) -> None:
    device = {1: [(0x21000, 0x23000)]}
    found = contents.read(str(directory), device)
    assert found.memory() == {
        "heap": PAGE,
        "anonymous": 2 * PAGE,
        "device": 2 * PAGE,
        "file": 2 * PAGE,
        "stack": PAGE,
        "shared": 6 * PAGE,
    }
    assert found.page_files == {"pages-3.img": 8 * PAGE, "pages-4.img": 6 * PAGE}
    assert [(one.pid, one.comm, one.threads, one.dead) for one in found.tasks] == [
        (1, "trainer", 2, False),
        (7, "sh", 1, True),
    ]
    assert found.plugins == ["cuda_plugin"]


def test_files_sockets_and_mounts(directory: Path) -> None:
    loopback = int.from_bytes(socket.inet_aton("127.0.0.1"), "little")
    listening = contents.InternetSocket(
        family=2, proto=6, state=10, src_port=8080, dst_port=0, src_addr=[loopback]
    )
    wide = struct.unpack("<4I", socket.inet_pton(socket.AF_INET6, "fe80::1"))
    established = contents.InternetSocket(
        family=10,
        proto=6,
        state=1,
        src_port=1,
        dst_port=443,
        src_addr=list(wide),
        dst_addr=list(wide),
    )
    files = [
        contents.OpenFile(type=1, id=1, reg=contents.RegularFile(name="/data/weights")),
        contents.OpenFile(type=4, id=2, isk=listening),
        contents.OpenFile(type=4, id=3, isk=established),
        contents.OpenFile(type=5, id=4, usk=contents.UnixSocket(state=10, name=b"\0abstract")),
        contents.OpenFile(type=99, id=5),
    ]
    write(directory, "files.img", 0x56303138, *files)
    mounts = [
        contents.MountPoint(mountpoint="/", source="overlay", fsname="overlay"),
        contents.MountPoint(mountpoint="/data", ext_mount=True, ext_key="/data"),
    ]
    write(directory, "mountpoints-9.img", 0x55563928, *mounts)
    found = contents.read(str(directory))
    assert found.files == [
        ("file", "/data/weights"),
        ("internet socket", "tcp 127.0.0.1:8080 listening"),
        ("internet socket", "tcp [fe80::1]:1 -> [fe80::1]:443 established"),
        ("type 99", ""),
        ("unix socket", "@abstract listening"),
    ]
    assert found.mounts == [("/", "overlay", ""), ("/data", "", "/data")]


@pytest.mark.parametrize("name", ["core-1.img", "mm-1.img", "pagemap-1.img", "pstree.img"])
def test_what_is_broken_is_named(directory: Path, name: str) -> None:
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(images.ImageError, match=f"{name}: cut short"):
        contents.read(str(directory))
    path.unlink()
    with pytest.raises(images.ImageError, match=f"no readable {name}"):
        contents.read(str(directory))


def test_connections_through_the_loopback(tmp_path: Path) -> None:
    """Only established ones: no listening socket, none to another machine, no UDP."""

    def entry(family: int, **fields: object) -> contents.OpenFile:
        isk = contents.InternetSocket(**{"family": family, "proto": 6, **fields})
        return contents.OpenFile(type=4, id=1, isk=isk)

    here, there = (int.from_bytes(socket.inet_aton(a), "little") for a in ("127.0.0.1", "10.1.2.3"))
    six = [0, 0, 0, int.from_bytes(b"\0\0\0\1", "little")]
    v4 = {"src_addr": [here], "dst_addr": [here]}
    records = [
        entry(socket.AF_INET, src_port=80, dst_port=0, **v4),
        entry(socket.AF_INET, src_port=80, dst_port=4000, **v4),
        entry(socket.AF_INET, src_port=81, dst_port=4000, src_addr=[there], dst_addr=[there]),
        entry(socket.AF_INET, src_port=82, dst_port=4000, **{**v4, "proto": 17}),
        entry(socket.AF_INET6, src_port=83, dst_port=4001, src_addr=six, dst_addr=six),
    ]
    write(tmp_path, "files.img", 0x56303138, *records)
    assert contents.loopback_connections(str(tmp_path)) == {
        ("ipv4", "127.0.0.1", 80, "127.0.0.1", 4000),
        ("ipv6", "::1", 83, "::1", 4001),
    }
    assert contents.loopback_connections(str(tmp_path / "elsewhere")) == set()
