"""Compressed files of the lane: whole again or refused, and made only where that is faster."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from shim import digests
from shim import lane as shim_lane
from shim.config import GritOptions
from shim.cuda import choice, codec, lane, packed
from shim.cuda._codec import ffi
from shim.cuda.choice import Disk, Trial
from shim.cuda.driver import Driver
from shim.cuda.errors import LaneError
from shim.cuda.shards import Shard
from shim.cuda.suspension import Process
from shim.gritctl import node_checks, stored
from shim.manifest import NO_COMPRESSION, File, Manifest
from tests.test_checkpoint_dir import a_manifest

MIB = 1 << 20
CHUNK = packed.CHUNK
SIZE = digests.BLOCK + 5 * CHUNK + 12288  # two files, the last chunk shorter
ME = os.getpid()

both = pytest.mark.parametrize("name", [codec.LZ4, codec.ZSTD])


def text(size: int) -> bytes:
    return b"".join(b"weight %d; " % number for number in range(size // 9))[:size]


class Memory:
    """Of this process: a chunk each of what there is, and otherwise never touched."""

    def __init__(self, size: int = SIZE) -> None:
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))
        self.end = self.start + size

    def put(self, number: int, data: bytes) -> None:
        self.map[number * CHUNK : number * CHUNK + len(data)] = data


@pytest.fixture
def memory() -> Memory:
    made = Memory()
    made.put(0, text(CHUNK))
    made.put(2, os.urandom(CHUNK))
    made.put(3, bytes(CHUNK))  # touched
    made.put(5, os.urandom(CHUNK // 2) + bytes(CHUNK // 2))
    made.put(6, text(9999))
    made.put(17, os.urandom(CHUNK // 4) + text(CHUNK // 2))
    made.put(21, text(12288))
    return made


Write = Callable[..., list[Shard]]


@pytest.fixture
def write(memory: Memory, tmp_path: Path) -> Write:
    return partial(written, memory, tmp_path)


def written(
    source: Memory,
    place: Path,
    name: str,
    direct: bool = False,
    *,
    threads: int = 2,
    algorithm: str = digests.XXH3,
) -> list[Shard]:
    return lane.write(
        ME,
        source.start,
        source.end,
        str(place),
        "lane-1-",
        threads=threads,
        direct=direct,
        algorithm=algorithm,
        compression=name,
    )


def fill(
    target: Memory,
    place: Path,
    shards: list[Shard],
    fresh: bool = True,
    *,
    threads: int = 2,
    algorithm: str = digests.XXH3,
) -> None:
    lane.fill(
        ME, target.start, str(place), shards, threads=threads, fresh=fresh, algorithm=algorithm
    )


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@both
def test_memory_goes_to_compressed_files_and_back(
    memory: Memory, write: Write, tmp_path: Path, name: str, direct: bool
) -> None:
    shards = write(name, direct)
    assert [(s.name, s.start, s.size, s.codec) for s in shards] == [
        ("lane-1-0.img", memory.start, digests.BLOCK, name),
        ("lane-1-1.img", memory.start + digests.BLOCK, SIZE - digests.BLOCK, name),
    ]
    sizes = {s.name: (tmp_path / s.name).stat().st_size for s in shards}
    assert 7 * MIB < sum(sizes.values()) < 3 * CHUNK  # random bytes as they were, and no zeros
    files = {name: (str(tmp_path / name), size) for name, size in sizes.items()}
    assert digests.take(files, algorithm=digests.XXH3) == {s.name: s.digest for s in shards}

    data, at = (tmp_path / "lane-1-0.img").read_bytes(), 0
    for length in sizes_in(tmp_path / "lane-1-0.img"):
        end = at + packed.padded(length)
        assert not any(data[at + length : end])  # nothing of the chunk before
        at = end

    fresh, used = Memory(), Memory()
    fill(fresh, tmp_path, shards)
    assert fresh.map[:] == memory.map[:]
    for at in range(0, SIZE, MIB):
        used.map[at : at + 8] = b"old data"
    fill(used, tmp_path, shards, fresh=False)
    assert used.map[:] == memory.map[:]


@both
def test_zeros_are_in_no_file_and_are_not_put_into_fresh_memory(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Memory(3 * CHUNK)
    source.put(1, bytes(CHUNK))
    shards = written(source, tmp_path, name, threads=1, algorithm=digests.SHA256)
    (shard,) = shards
    assert (tmp_path / shard.name).stat().st_size == 4096  # the index
    monkeypatch.setattr(lane, "_move", lambda *given: pytest.fail("it was moved"))
    fill(source, tmp_path, shards, threads=1, algorithm=digests.SHA256)


def test_the_helper_compresses_and_decompresses(
    driver: Driver, memory: Memory, tmp_path: Path
) -> None:
    found, why = driver.lane_choose(
        ME,
        codec.ZSTD,
        [(memory.start, memory.end)],
        str(tmp_path),
        threads=2,
        direct=False,
        timeout=60,
    )
    assert (found, why) == (codec.ZSTD, "configured")
    shards = driver.lane_write(
        ME,
        memory.start,
        memory.end,
        str(tmp_path),
        "lane-",
        threads=2,
        direct=False,
        algorithm=digests.XXH3,
        compression=found,
        timeout=60,
    )
    assert {shard.codec for shard in shards} == {codec.ZSTD}
    target = Memory()
    driver.lane_fill(
        ME,
        target.start,
        str(tmp_path),
        shards,
        threads=2,
        fresh=True,
        algorithm=digests.XXH3,
        timeout=60,
    )
    assert target.map[:] == memory.map[:]


@both
def test_what_has_changed_since_it_was_compressed_is_noticed(
    driver: Driver, memory: Memory, write: Write, tmp_path: Path, name: str
) -> None:
    shards = [Shard(*shard.whole()) for shard in write(name)]  # type: ignore[arg-type]
    driver.lane_check(ME, shards, threads=2, timeout=60)
    memory.map[6 * CHUNK + 5] ^= 1
    with pytest.raises(LaneError, match=r"changed since it was written to lane-1-0\.img"):
        driver.lane_check(ME, shards, threads=2, timeout=60)


def index_of(path: Path) -> int:
    """Where the index of the first file, of 16 chunks, begins."""
    return path.stat().st_size - 4096


def sizes_in(path: Path) -> list[int]:
    return list(struct.unpack_from("<16I", path.read_bytes(), index_of(path) + 24))


def put(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, at)


def put_size(path: Path, number: int, size: int) -> None:
    put(path, index_of(path) + 24 + 4 * number, struct.pack("<I", size))


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: os.truncate(path, 0), "shorter than its index"),
    "cut within the index": (
        lambda path: os.truncate(path, path.stat().st_size - 100),
        "no index of",
    ),
    "cut by a page": (lambda path: os.truncate(path, path.stat().st_size - 4096), "no index of"),
    "longer": (lambda path: os.truncate(path, path.stat().st_size + 4096), "no index of"),
    "no magic": (lambda path: put(path, index_of(path), b"G"), "no index of"),
    "another codec": (lambda path: put(path, index_of(path) + 12, b"zst4"), "no index of"),
    "a chunk too large": (lambda path: put_size(path, 0, CHUNK + 1), "more bytes than it had"),
    "a chunk of 4 GiB": (lambda path: put_size(path, 15, 0xFFFFFFFF), "more bytes than it had"),
    "a page too many": (lambda path: put_size(path, 0, sizes_in(path)[0] + 4096), "bytes, not"),
    "a chunk too few": (lambda path: put_size(path, 5, 0), "bytes, not"),
    "one byte less": (lambda path: put_size(path, 0, sizes_in(path)[0] - 1), "decompressed"),
    "another chunk": (lambda path: put(path, 0, bytes(4096)), "decompressed|not those that were"),
    "as it was, flipped": (
        lambda path: put(path, packed.padded(sizes_in(path)[0]) + 99, b"flipped"),
        "not those that were written",
    ),
    "padding": (lambda path: put(path, sizes_in(path)[0], b"!"), "not those that were written"),
}


@both
@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_another_is_told_by_its_name(
    write: Write, tmp_path: Path, name: str, how: str
) -> None:
    shards = write(name)
    change, message = BROKEN[how]
    change(tmp_path / "lane-1-0.img")
    with pytest.raises(LaneError, match=rf"/lane-1-0.img is damaged: .*({message})"):
        fill(Memory(), tmp_path, shards)


@both
def test_a_file_of_another_size_of_memory_is_refused(
    write: Write, tmp_path: Path, name: str
) -> None:
    """Whose manifest, say, was made for it by somebody else."""
    shards = write(name)
    for size in (shards[0].size - CHUNK, shards[0].size - 4096, digests.BLOCK * 2, 1 << 60):
        other = Shard(shards[0].name, 0, size, shards[0].digest, name)
        with pytest.raises(LaneError, match="is damaged"):
            fill(Memory(), tmp_path, [other])


@both
def test_a_chunk_of_another_size_is_refused_whatever_the_digest_says(
    write: Write, tmp_path: Path, name: str
) -> None:
    shards = write(name)
    path = tmp_path / shards[0].name
    made = Memory(CHUNK)
    source = Memory(CHUNK)
    source.put(0, text(CHUNK))
    size = codec.compressor(name)(source.start, CHUNK - 4096, made.start, CHUNK)
    assert packed.padded(size) == packed.padded(sizes_in(path)[0])  # of a page less
    put(path, 0, made.map[:size])
    put_size(path, 0, size)
    digest = digests.take({"it": (str(path), path.stat().st_size)}, algorithm=digests.XXH3)
    shards[0].digest = str(digest["it"])
    with pytest.raises(LaneError, match="chunk 0 cannot be decompressed"):
        fill(Memory(), tmp_path, shards)


def garbled(data: bytes) -> Iterator[bytes]:
    yield b""
    yield os.urandom(len(data))
    yield b"\xff" * len(data)
    for length in range(1, 64):
        yield data[:-length]
    for at in range(0, len(data), max(len(data) // 500, 1)):
        for bit in (1, 64, 255):
            yield data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :]


@both
def test_nothing_is_written_beyond_the_room_there_is(name: str) -> None:
    """Whatever is decompressed."""
    room, guard = 256 << 10, b"guard" * 1000
    source, made, target = Memory(MIB), Memory(2 * MIB), Memory(MIB)
    source.put(0, text(MIB // 2) + os.urandom(1000))
    size = codec.compressor(name)(source.start, MIB, made.start, 2 * MIB)
    whole = made.map[:size]
    decompress = codec.decompressor(name)
    assert decompress(made.start, size, target.start, MIB) == MIB
    assert target.map[:] == source.map[:]

    small = codec.compressor(name)(source.start, room, made.start, 2 * MIB)
    for data in [whole, *garbled(made.map[:small])]:
        target.map[room : room + len(guard)] = guard
        made.map[: len(data)] = data
        assert decompress(made.start, len(data), target.start, room) <= room
        assert target.map[room : room + len(guard)] == guard
        if data is whole:
            assert decompress(made.start, len(data), target.start, room) == 0


@both
def test_what_does_not_fit_is_not_compressed(name: str) -> None:
    source, made = Memory(CHUNK), Memory(CHUNK)
    source.put(0, os.urandom(CHUNK))
    for room in (0, 100, CHUNK - 4096):
        made.map[room : room + 5] = b"guard"
        assert codec.compressor(name)(source.start, CHUNK, made.start, room) == 0
        assert made.map[room : room + 5] == b"guard"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def lose(*names: str) -> None:
        lost = {name: (f"libgone-{name}.so.1", f"gone-{name}") for name in names}
        monkeypatch.setattr(codec, "LIBRARIES", {**codec.LIBRARIES, **lost})

    return lose


def chosen(wanted: str, memory: Memory, place: Path) -> tuple[str, str]:
    return choice.choose(
        ME,
        wanted=wanted,
        ranges=[(memory.start, memory.end)],
        directory=str(place),
        threads=2,
        direct=False,
    )


@both
def test_a_library_that_is_missing_costs_the_compression_and_no_more(
    memory: Memory, write: Write, tmp_path: Path, name: str, without: Callable[..., None]
) -> None:
    shards = write(name)
    without(name)
    found, why = chosen(name, memory, tmp_path)
    assert found == choice.NONE
    assert f"libgone-{name}.so.1" in why and f"apt-get install gone-{name}" in why
    line = node_checks.compression(GritOptions(lane_compression=name))  # type: ignore[arg-type]
    assert (line.status, line.found) == (node_checks.WARN, f"none: {why}")
    with pytest.raises(LaneError, match=rf"lane-1-\d.img: .*install gone-{name}"):
        fill(Memory(), tmp_path, shards)
    for shard in shards:
        (tmp_path / shard.name).unlink()
    with pytest.raises(LaneError, match=f"cannot write .*lane-1-.*install gone-{name}"):
        write(name)
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_is_not_known_is_told(write: Write, tmp_path: Path) -> None:
    shards = write(codec.LZ4)
    shards[1].codec = "snappy"
    with pytest.raises(LaneError, match=r"lane-1-1.img: this grit knows no compression 'snappy'"):
        fill(Memory(), tmp_path, shards)


GB = 1e9
WEIGHTS = {codec.LZ4: Trial(20 * GB, 1.0), codec.ZSTD: Trial(2 * GB, 1.28)}
SPARSE = {codec.LZ4: Trial(2 * GB, 2.0), codec.ZSTD: Trial(0.8 * GB, 2.6)}
COPY = 1 / (4 * GB)  # all that an ordinary disk is to the processors


@pytest.mark.parametrize(
    ("disk", "trials", "expected"),
    [
        (Disk(0.2 * GB, COPY), WEIGHTS, codec.ZSTD),
        (Disk(1.0 * GB, COPY), WEIGHTS, codec.ZSTD),
        (Disk(1.5 * GB, COPY), WEIGHTS, choice.NONE),  # zstd would be waited for
        (Disk(0.2 * GB, COPY), SPARSE, codec.ZSTD),
        (Disk(0.6 * GB, COPY), SPARSE, codec.LZ4),
        (Disk(3.0 * GB, COPY), SPARSE, choice.NONE),
        (Disk(2.0 * GB, COPY), {codec.LZ4: Trial(5 * GB, 2.0)}, codec.LZ4),
        (Disk(2.0 * GB, 1 / (2 * GB)), {codec.LZ4: Trial(3 * GB, 2.0)}, choice.NONE),  # memory
        (Disk(0.2 * GB, 0), {codec.LZ4: Trial(20 * GB, 1.09)}, choice.NONE),  # not worth it
        (Disk(0.2 * GB, 0), {}, choice.NONE),
    ],
)
def test_what_is_fastest_is_chosen(disk: Disk, trials: dict[str, Trial], expected: str) -> None:
    found, why = choice.best(disk, trials)
    assert found == expected
    assert f"as it is {disk.speed / GB:.2f}" in why
    assert all(
        f"{name} {choice.rate(disk, trial) / GB:.2f}" in why for name, trial in trials.items()
    )


def test_the_choice_is_by_what_is_in_the_memory_and_how_fast_the_disk_is(
    memory: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: Callable[..., None]
) -> None:
    seen: list[memoryview] = []

    def slow(directory: str, chunks: list[memoryview], threads: int, direct: bool) -> Disk:
        seen.extend(chunks)
        return Disk(1e6, 0)

    with monkeypatch.context() as patch:
        patch.setattr(choice, "measured", slow)
        patch.setattr(choice, "_CHUNKS", 100)  # all of it
        found, why = chosen(choice.AUTO, memory, tmp_path)
        assert found == codec.ZSTD and "lz4" in why
        assert sorted(map(len, seen)) == [12288, *[CHUNK] * 5]  # no zeros
        without(codec.ZSTD)
        found, why = chosen(choice.AUTO, memory, tmp_path)
        assert found == codec.LZ4 and "gone-zstd" in why
        without(codec.ZSTD, codec.LZ4)
        found, why = chosen(choice.AUTO, memory, tmp_path)
        assert found == choice.NONE and "gone-zstd" in why and "gone-lz4" in why
    assert chosen(choice.AUTO, Memory(), tmp_path)[0] == choice.NONE


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
def test_measuring_a_disk_leaves_nothing_there(tmp_path: Path, direct: bool) -> None:
    chunks = [memoryview(Memory(CHUNK).map)]
    disk = choice.measured(str(tmp_path), chunks, 3, direct)
    assert disk.speed > 0 and disk.work >= 0
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_measured_is_written_to_as_ever(
    memory: Memory, small_disk: Path, tmp_path: Path
) -> None:
    found, why = chosen(choice.AUTO, memory, small_disk)
    assert (found, why) == (choice.NONE, "the disk cannot be measured: No space left on device")
    assert list(small_disk.iterdir()) == []
    found, why = chosen(choice.AUTO, memory, tmp_path / "not there")
    assert (found, why) == (choice.NONE, "the disk cannot be measured: No such file or directory")


def test_a_manifest_tells_of_the_codec_and_nothing_loses_it(tmp_path: Path) -> None:
    (tmp_path / "lane-1-0.img").write_bytes(b"packed")
    digest = digests.take({"it": (str(tmp_path / "lane-1-0.img"), 6)})["it"]
    process = Process(7, 1, (7,), "train")
    process.lane = [
        Shard("lane-1-0.img", 4096, 4 * MIB, str(digest), codec.LZ4),
        Shard("lane-1-1.img", 4096 + 4 * MIB, MIB, "a" * 64),
    ]
    assert [len(shard.plain()) for shard in process.lane] == [5, 4]
    assert [s.codec for s in Process.from_dict(process.to_dict()).lane] == [codec.LZ4, ""]

    manifest = a_manifest()
    manifest.created = "2026-11-28T12:00:00+00:00"
    manifest.compression = {"algorithm": codec.LZ4, "why": "configured"}
    manifest.cuda_processes = [process.to_dict()]
    manifest.files = {"lane-1-0.img": File(6, str(digest)), "inventory.img": File(0, "0" * 64)}
    manifest = Manifest.decode(manifest.encode(), "grit.json")
    assert shim_lane.files(manifest) == {"lane-1-0.img"}
    shim_lane.forget_digests(manifest)
    assert shim_lane.files(manifest) == set()
    shim_lane.take_digests(manifest, str(tmp_path))
    assert shim_lane.files(manifest) == {"lane-1-0.img"}
    assert shim_lane.files(manifest, packed=False) == set()
    (again,) = (Process.from_dict(plain) for plain in manifest.cuda_processes)
    assert [s.codec for s in again.lane] == [codec.LZ4, ""]


def test_what_is_left_of_the_memory_is_shown(tmp_path: Path) -> None:
    manifest = a_manifest()
    assert shown(tmp_path, manifest).compressed == ""
    manifest.compression = {"algorithm": NO_COMPRESSION, "why": "it is slower"}
    assert shown(tmp_path, manifest).compressed == ""
    manifest.compression["algorithm"] = codec.ZSTD
    assert shown(tmp_path, manifest).compressed == codec.ZSTD
    process = Process(7, 1, (7,), "train")
    process.lane = [
        Shard("lane-1-0.img", 4096, 3 * MIB, "", codec.ZSTD),
        Shard("lane-1-1.img", 4096 + 3 * MIB, MIB, "", codec.ZSTD),
    ]
    manifest.cuda_processes = [{}, {"lane": 5}, {"lane": [[1], "a"]}, process.to_dict()]
    manifest.files = {"lane-1-0.img": File(2 * MIB, "0" * 64), "lane-1-1.img": File(MIB, "0" * 64)}
    assert shown(tmp_path, manifest).compressed == "zstd, to 75%"


def shown(place: Path, manifest: Manifest) -> stored.Stored:
    manifest.created = "2026-11-28T12:00:00+00:00"
    manifest.files["inventory.img"] = File(0, "0" * 64)
    (place / "grit.json").write_bytes(manifest.encode())
    return stored.Stored(str(place), "", str(place))
