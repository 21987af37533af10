"""A layer unpacked onto a root file system: the right result, and never a byte outside."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pathlib
import stat
import subprocess
import sys
import tarfile
import tempfile

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shim.rootfs_diff import DiffError, apply

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="unpacking changes root (chroot)")

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, len(data), 0o644, 1_700_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: object) -> Entry:
    return entry(name, b"", tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.SYMTYPE, linkname=target)


def hard_link(name: str, target: str, **fields: object) -> Entry:
    return entry(name, b"", tarfile.LNKTYPE, **{"linkname": target, **fields})


def tarred(*entries: Entry, format: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(
        fileobj=packed, mode="w", format=format, encoding="utf-8", errors="surrogateescape"
    ) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


@dataclasses.dataclass
class Place:
    """A root file system with a neighbour that nothing may touch."""

    root: pathlib.Path
    outside: pathlib.Path
    tar: pathlib.Path

    def apply(self, *layer: Entry | bytes) -> list[str]:
        raw = [part for part in layer if isinstance(part, bytes)]
        entries = [part for part in layer if not isinstance(part, bytes)]
        self.tar.write_bytes(raw[0] if raw else tarred(*entries))
        return apply(str(self.tar), str(self.root))

    def refuses(self, message: str, *layer: Entry | bytes) -> None:
        with pytest.raises(DiffError, match=message) as caught:
            self.apply(*layer)
        assert str(caught.value).startswith(f"cannot apply {self.tar} to {self.root}: ")
        assert str(caught.value).endswith("half changed: do not start the container")

    def names(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Place:
    found = Place(tmp_path / "root", tmp_path / "outside", tmp_path / "layer.tar")
    found.root.mkdir()
    found.outside.mkdir()
    (found.outside / "secret").write_bytes(b"secret")
    return found


@pytest.fixture(autouse=True)
def nothing_outside_is_touched(place: Place) -> object:
    before = snapshot(place.outside.parent, skip=("root", "layer.tar"))
    yield
    assert snapshot(place.outside.parent, skip=("root", "layer.tar")) == before


def snapshot(root: pathlib.Path, skip: tuple[str, ...] = ()) -> dict[str, tuple[object, ...]]:
    """All that a layer can say about each path below the root."""
    found: dict[str, tuple[object, ...]] = {}
    groups: dict[int, list[str]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if name.split("/", maxsplit=1)[0] in skip:
            continue
        status = path.lstat()
        what: object = None
        if stat.S_ISREG(status.st_mode):
            what = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            what = os.readlink(path)
        elif not stat.S_ISDIR(status.st_mode):
            what = status.st_rdev
        attributes = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
        }
        linked = groups.setdefault(status.st_ino, [])
        if not stat.S_ISDIR(status.st_mode):
            linked.append(name)
        found[name] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            what,
            attributes,
            linked,
        )
    return found


def test_files_of_every_kind(place: Place) -> None:
    notices = place.apply(
        directory("d", mode=0o1777, uid=5, gid=6, pax_headers={"mtime": "1600000000.123456789"}),
        entry("d/file", b"data" * 300_000, mode=0o6755, uid=70000, gid=3_000_000),
        entry("d/empty", mode=0),
        symlink("d/link", "../../../outside/secret"),
        hard_link("d/hard", "d/file", mode=0o6755, uid=70000, gid=3_000_000),
        hard_link("d/hard-link-to-link", "d/link"),
        entry("d/fifo", kind=tarfile.FIFOTYPE, mode=0o600),
        entry("d/null", kind=tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=3),
        entry("d/disk", kind=tarfile.BLKTYPE, mode=0o660, devmajor=8, devminor=300, gid=6),
        entry("d/" + "n" * 250, b"long"),
        entry("d/" + "p/" * 150 + "deep", b"deep"),
        entry(
            "d/caf\xe9", b"utf-8", pax_headers={"mtime": "1600000001.5", "atime": "1700000002.25"}
        ),
        entry("d/caf\udce9", b"latin-1"),
    )
    assert notices == ["'d/disk': device node 8:300 left out"]
    root = place.root
    status = (root / "d").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o1777, 5, 6)
    assert status.st_mtime_ns == 1_600_000_000_123_456_789
    status = (root / "d/file").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (
        0o6755,
        70000,
        3_000_000,
    )
    assert status.st_mtime == 1_700_000_000
    assert (root / "d/file").read_bytes() == b"data" * 300_000
    assert (root / "d/hard").samefile(root / "d/file") and status.st_nlink == 2
    assert os.readlink(root / "d/link") == "../../../outside/secret"
    assert (root / "d/hard-link-to-link").lstat().st_ino == (root / "d/link").lstat().st_ino
    assert stat.S_ISFIFO((root / "d/fifo").lstat().st_mode)
    null = (root / "d/null").lstat()
    assert stat.S_ISCHR(null.st_mode) and null.st_rdev == os.makedev(1, 3)
    assert stat.S_IMODE(null.st_mode) == 0o666
    assert (root / ("d/" + "n" * 250)).read_bytes() == b"long"
    assert (root / ("d/" + "p/" * 150 + "deep")).read_bytes() == b"deep"
    assert (root / "d/caf\xe9").stat().st_mtime_ns == 1_600_000_001_500_000_000
    assert (root / "d/caf\xe9").stat().st_atime_ns == 1_700_000_002_250_000_000
    assert pathlib.Path(os.fsdecode(os.fsencode(root) + b"/d/caf\xe9")).read_bytes() == b"latin-1"


def test_directories_made_on_the_way(place: Place) -> None:
    """Open to be read: 0755 for each, whatever the umask, as containerd makes them."""
    place.apply(entry("a/b/c"))
    modes = [stat.S_IMODE((place.root / name).stat().st_mode) for name in ("a", "a/b")]
    assert modes == [0o755, 0o755]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress])
def test_formats_and_compressions(place: Place, format: int, pack: object) -> None:
    assert callable(pack)
    name = "/".join(["n" * 50] * (2 if format == tarfile.USTAR_FORMAT else 6))
    place.apply(pack(tarred(entry(name, b"x" * 5000), format=format)))
    assert (place.root / name).read_bytes() == b"x" * 5000


def test_zstd_frames_and_skippable_frames_are_one_stream(place: Place) -> None:
    packed = tarred(entry("a", b"x" * 100_000))
    compress = zstandard.ZstdCompressor().compress
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"
    place.apply(skippable + compress(packed[:5000]) + compress(packed[5000:]))
    assert (place.root / "a").read_bytes() == b"x" * 100_000


def test_zstd_without_the_package_is_a_clear_error(place: Place) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("this Python has zstd of its own")
    with tempfile.TemporaryDirectory() as empty:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
        place.tar.write_bytes(zstandard.ZstdCompressor().compress(tarred(entry("a"))))
        with pytest.raises(DiffError, match=r"needs Python 3\.14 or the package zstandard"):
            apply(str(place.tar), str(place.root), python=f"{empty}/bin/python")


@pytest.mark.parametrize(
    "options", [["--format=gnu"], *([f"--sparse-version={v}"] for v in ("0.0", "0.1", "1.0"))]
)
def test_sparse_files_of_gnu_tar(place: Place, tmp_path: pathlib.Path, options: list[str]) -> None:
    source = tmp_path / "root" / "source"
    source.mkdir()
    with (source / "sparse").open("wb") as file:
        for at in (3 << 20, 9 << 20, 10 << 20):
            file.seek(at)
            file.write(b"x" * 70_001)
        file.truncate(64 << 20)
    (source / "after").write_bytes(b"after")
    whole = (source / "sparse").read_bytes()
    form = options if options[0] == "--format=gnu" else ["--format=pax", *options]
    subprocess.run(
        ["tar", "-C", source, "--sparse", *form, "-cf", place.tar, "sparse", "after"], check=True
    )
    (source / "sparse").unlink()
    assert place.tar.stat().st_size < 1 << 20
    place.apply(place.tar.read_bytes())
    assert (place.root / "sparse").read_bytes() == whole
    assert (place.root / "after").read_bytes() == b"after"
    assert (place.root / "sparse").stat().st_blocks * 512 < 2 << 20


def test_whiteouts_remove(place: Place) -> None:
    (place.root / "d/e").mkdir(parents=True)
    for name in ("d/gone", "d/kept", "d/e/f"):
        (place.root / name).touch()
    (place.root / "d/link").symlink_to("kept")
    place.apply(
        entry("d/.wh.gone"), entry("d/.wh.e"), entry("d/.wh.link"), entry("d/.wh.never-there")
    )
    assert place.names() == {"d", "d/kept"}


@pytest.mark.parametrize("last", [False, True])
def test_an_opaque_directory_hides_the_lower_and_keeps_the_layers_own(
    place: Place, last: bool
) -> None:
    (place.root / "d/e").mkdir(parents=True)
    for name in ("d/lower", "d/both", "d/e/lower", "beside"):
        (place.root / name).write_bytes(b"lower")
    marker = [entry("d/.wh..wh..opq")]
    own = [entry("d/both", b"own"), entry("d/e/own"), directory("d/new"), entry("d/new/own")]
    place.apply(directory("d"), *(own + marker if last else marker + own))
    assert place.names() == {"d", "d/both", "d/e", "d/e/own", "d/new", "d/new/own", "beside"}
    assert (place.root / "d/both").read_bytes() == b"own"


def test_an_opaque_root(place: Place) -> None:
    (place.root / "lower").touch()
    place.apply(entry("own"), entry(".wh..wh..opq"))
    assert place.names() == {"own"}


def test_aufs_leftovers_are_passed_over(place: Place) -> None:
    place.apply(directory(".wh..wh.plnk"), entry(".wh..wh.plnk/12.3", b"x"), entry(".wh..wh.aufs"))
    assert place.names() == set()


def test_directories_merge_and_all_else_is_replaced(place: Place) -> None:
    for name in ("merged", "becomes-file", "becomes-link"):
        (place.root / name).mkdir()
        (place.root / name / "inner").touch()
    (place.root / "was-file").touch()
    (place.root / "was-link").symlink_to("merged")
    os.link(place.root / "was-file", place.root / "its-twin")
    place.apply(
        directory("merged", mode=0o700),
        entry("becomes-file", b"file"),
        symlink("becomes-link", "merged"),
        directory("was-link"),
        entry("was-file", b"new"),
    )
    assert place.names() == {
        *("merged", "merged/inner", "becomes-file", "becomes-link", "was-link", "was-file"),
        "its-twin",
    }
    assert (place.root / "merged").stat().st_mode == stat.S_IFDIR | 0o700
    assert not (place.root / "was-link").is_symlink()
    assert (place.root / "its-twin").read_bytes() == b""


def test_the_root_itself_is_left_as_it_is(place: Place) -> None:
    before = place.root.stat()
    place.apply(directory("./", mode=0o700, uid=7), directory("/", mode=0o700))
    after = place.root.stat()
    assert (after.st_mode, after.st_uid) == (before.st_mode, before.st_uid)


def test_times_of_directories_survive_what_is_put_into_them(place: Place) -> None:
    place.apply(
        directory("d", mtime=1000),
        directory("d/e", mtime=2000),
        entry("d/e/f", mtime=3000),
        entry("d/f", mtime=4000),
        directory("gone", mtime=1),
        entry(".wh.gone"),
    )
    times = {name: (place.root / name).stat().st_mtime for name in ("d", "d/e", "d/e/f", "d/f")}
    assert times == {"d": 1000, "d/e": 2000, "d/e/f": 3000, "d/f": 4000}
    assert not (place.root / "gone").exists()


@pytest.mark.parametrize(
    ("time", "ns"),
    [("-5.5", 0), ("0.000000001", 1), ("1.1234567899", 1_123_456_789), ("99999999999", 0)],
)
def test_times_are_exact_and_within_bounds(place: Place, time: str, ns: int) -> None:
    place.apply(entry("f", pax_headers={"mtime": time}))
    assert (place.root / "f").stat().st_mtime_ns == ns


def test_extended_attributes(place: Place) -> None:
    value = bytes(range(256)) + b"\n=\n"
    text = value.decode("utf-8", "surrogateescape")
    capability = b"\x01\x00\x00\x02\x00\x20" + bytes(14)
    notices = place.apply(
        entry(
            "f",
            uid=9,
            pax_headers={
                "SCHILY.xattr.user.any": text,
                "SCHILY.xattr.security.capability": capability.decode("utf-8", "surrogateescape"),
                "SCHILY.xattr.trusted.overlay.opaque": "y",
                "SCHILY.xattr.nowhere.known": "y",
            },
        ),
        directory("d", pax_headers={"SCHILY.xattr.user.dir": ""}),
    )
    assert os.getxattr(place.root / "f", "user.any") == value
    assert os.getxattr(place.root / "f", "security.capability") == capability
    assert os.getxattr(place.root / "d", "user.dir") == b""
    assert sorted(os.listxattr(place.root / "f")) == ["security.capability", "user.any"]
    assert notices == [
        "'f': extended attribute 'trusted.overlay.opaque' left out: it is the host's to set",
        "'f': extended attribute 'nowhere.known' left out: Operation not supported",
    ]


@pytest.mark.parametrize(
    "layer",
    [
        b"",
        tarred(),
        tarred(entry("a", b"x"))[:1024],  # without the zero blocks at the end
        tarred(entry("a", b"x"))[:1536],
        tarred(entry("a", b"x")) + b"trailing garbage",
    ],
)
def test_loose_ends_that_go_accepts(place: Place, layer: bytes) -> None:
    place.apply(layer)
    assert place.names() == ({"a"} if b"a" in layer else set())


# -- hostile and damaged archives ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside/new", "a/../../outside/new", "/../outside/new", "..", "a/b/.."]
)
def test_names_that_lead_upwards_are_refused(place: Place, name: str) -> None:
    place.refuses("leads upwards", entry(name, b"x"))
    place.refuses("leads upwards", directory(name))
    place.refuses("leads upwards", entry("f"), hard_link("h", name))


def test_an_absolute_name_is_below_the_root(place: Place) -> None:
    place.apply(entry(f"{place.outside}/new", b"x"), hard_link("/h", f"/{place.outside}/new"))
    assert (place.root / "h").read_bytes() == b"x"
    assert not (place.outside / "new").exists()


@pytest.mark.parametrize("target", ["../outside", "../../../../../../{outside}", "{outside}"])
def test_links_on_the_way_stay_below_the_root(place: Place, target: str) -> None:
    """The directory they name is made inside, as containerd does it."""
    target = target.format(outside=place.outside)
    place.apply(
        symlink("way", target),
        entry("way/new", b"x"),
        entry("way/.wh.secret"),
        entry("way/.wh..wh..opq"),
        directory("way/sub"),
    )
    assert (place.outside / "secret").read_bytes() == b"secret"
    inside = [path for path in place.root.rglob("new") if not path.parent.is_symlink()]
    assert [path.read_bytes() for path in inside] == [b"x"]


def test_links_of_the_root_file_system_stay_below_it_too(place: Place) -> None:
    (place.root / "way").symlink_to(place.outside)
    (place.root / "secret").symlink_to(place.outside / "secret")
    place.apply(entry("way/secret", b"x"), entry("secret", b"y"))
    assert (place.root / "secret").read_bytes() == b"y"
    assert not (place.root / "secret").is_symlink()


def test_a_hard_link_cannot_name_what_is_outside(place: Place) -> None:
    (place.root / "way").symlink_to(place.outside)
    place.refuses("hard link to 'way/secret': No such file", hard_link("h", "way/secret"))
    place.refuses("hard link to", hard_link("h", f"{place.outside}/secret"))
    place.refuses("is a hard link to the root", hard_link("h", "/"))


def test_a_link_replaced_while_unpacking_leads_nowhere(place: Place) -> None:
    place.apply(
        directory("d"),
        entry("d/a", b"1"),
        symlink("d", str(place.outside)),
        entry("d/secret", b"2"),
    )
    assert (place.outside / "secret").read_bytes() == b"secret"


def test_links_in_a_circle(place: Place) -> None:
    place.refuses("'a/f'", symlink("a", "b"), symlink("b", "a"), entry("a/f"))


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.", "d/.wh.."])
def test_whiteouts_of_nothing_are_refused(place: Place, name: str) -> None:
    (place.root / "d").mkdir()
    place.refuses("is not a whiteout of anything", entry(name))
    assert place.names() == {"d"}


def test_a_file_where_a_directory_should_be(place: Place) -> None:
    place.refuses("'f/g': (Not a directory|File exists)", entry("f"), entry("f/g"))


def test_an_unknown_type_is_refused(place: Place) -> None:
    place.refuses("'f': is of type b'Z', which no layer has", entry("f", kind=b"Z"))


def damaged_header() -> bytes:
    packed = bytearray(tarred(entry("a", b"x"), entry("b", b"y")))
    packed[1024] ^= 1
    return bytes(packed)


def huge_extended_header() -> bytes:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 40
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (b"\0" * 100, "is no tar archive, or a damaged one"),
        (b"BZh9" + b"x" * 1000, "is no tar archive, or a damaged one"),
        (damaged_header(), "is no tar archive, or a damaged one"),
        (
            tarred(entry("a", b"x"), entry("b", b"y" * 5000))[:3000],
            "end of data|cut short",
        ),
        (tarred(entry("a", b"x"))[:700], "end of data|cut short"),
        (tarred(entry("a", b"x"), entry("b"))[:1300], "is no tar archive, or a damaged one"),
        (gzip.compress(tarred(entry("a", os.urandom(9999))))[:5000], "Compressed file ended"),
        (gzip.compress(tarred(entry("a")))[:-1], "Compressed file ended"),
        (gzip.compress(tarred(entry("a")))[:-8] + b"\0" * 8, "CRC check failed"),
        (b"\x28\xb5\x2f\xfd" + b"\xff" * 100, "zstd decompress"),
        (huge_extended_header(), "has an extended header of 1099511627776 bytes"),
    ],
    # Their own would hold gzip's time of writing, another one in each of several processes.
    ids=lambda value: value if isinstance(value, str) else "layer",
)
def test_damaged_archives_are_refused(place: Place, layer: bytes, message: str) -> None:
    place.refuses(message, layer)


def test_attributes_that_cannot_be(place: Place) -> None:
    place.refuses("has the time 'noon'", entry("f", pax_headers={"mtime": "noon"}))
    place.refuses("'f': ", entry("f", pax_headers={"SCHILY.xattr.user.": "x"}))


def test_the_containers_python_is_never_run(place: Place) -> None:
    """Once inside, an import would find the container's modules, and run them as root."""
    library = os.path.dirname(os.__file__)
    for where in (library, f"{library}/encodings"):
        inside = place.root / where.lstrip("/")
        inside.mkdir(parents=True)
        (inside / "cp437.py").write_text('open("/trapped", "w")')
        (inside / "wave.py").write_text('open("/trapped", "w")')
    code = """
import sys
from shim import oci_layer
oci_layer._enter(sys.argv[1])
for attempt in (lambda: "x".encode("cp437"), lambda: __import__("wave")):
    try:
        attempt()
    except Exception as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, place.root],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["LookupError", "ModuleNotFoundError"]
    assert not (place.root / "trapped").exists()


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (tarfile.CHRTYPE, (1, 1)),  # /dev/mem
        (tarfile.CHRTYPE, (0, 0)),  # to overlayfs a whiteout; a layer has .wh. for it
        (tarfile.CHRTYPE, (195, 0)),
        (tarfile.BLKTYPE, (1, 3)),
        (tarfile.BLKTYPE, (8, 0)),
    ],
)
def test_no_layer_brings_a_device(place: Place, kind: bytes, number: tuple[int, int]) -> None:
    """Nor does one in the image stand for another; what it replaces is gone all the same."""
    (place.root / "a").write_text("old")
    os.mknod(place.root / "b", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    device = {"kind": kind, "devmajor": number[0], "devminor": number[1]}
    text = f"device node {number[0]}:{number[1]} left out"
    assert place.apply(*(entry(name, **device) for name in ("a", "b", "new")), entry("end")) == [
        f"'{name}': {text}" for name in ("a", "b", "new")
    ]
    assert place.names() == {"end"}


def test_a_device_of_the_image_stays_with_the_layers_owner_and_mode(place: Place) -> None:
    os.mknod(place.root / "disk", stat.S_IFBLK | 0o600, os.makedev(8, 0))
    disk = entry("disk", kind=tarfile.BLKTYPE, mode=0o640, gid=6, devmajor=8, devminor=0)
    assert place.apply(disk) == []
    status = (place.root / "disk").lstat()
    assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o640, 6)
    assert status.st_rdev == os.makedev(8, 0)


def test_no_more_is_written_or_made_than_may_be(place: Place) -> None:
    """A bomb is refused by what it says of itself, before it is written."""
    place.tar.write_bytes(
        gzip.compress(tarred(entry("small", b"x" * 1000), entry("bomb", b"\0" * 50_000_000)))
    )
    with pytest.raises(DiffError, match="'bomb': would be more than the 1000000 bytes that may"):
        apply(str(place.tar), str(place.root), limits=(1_000_000, 0))
    assert not (place.root / "bomb").exists() or (place.root / "bomb").stat().st_size == 0
    place.tar.write_bytes(tarred(*(entry(f"{number}") for number in range(11))))
    with pytest.raises(DiffError, match="'10': would be more than the 10 files"):
        apply(str(place.tar), str(place.root), limits=(0, 10))
    assert apply(str(place.tar), str(place.root), limits=(0, 11)) == []


def test_a_full_file_system_is_not_filled_to_the_brim(place: Place, tmp_path: pathlib.Path) -> None:
    """By default a sixteenth of what was free, of room and of inodes, stays so."""
    program = (
        "import sys; from shim.rootfs_diff import apply\n"
        "try: apply(*sys.argv[1:])\n"
        "except Exception as error: print(error)"
    )
    mount = f"mount -t tmpfs -o size=4m,nr_inodes=100 none '{place.root}'"
    words = f'{mount} && \'{sys.executable}\' -c "$0" "$@"'
    said = []
    for layer in (
        [entry("big", b"x" * 3_950_000)],
        [entry(str(number)) for number in range(96)],
        [entry("fits", b"x" * 3_900_000), *(entry(str(number)) for number in range(80))],
    ):
        place.tar.write_bytes(tarred(*layer))
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", words, program, place.tar, place.root],
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(done.stdout)
    assert "'big': would be more than the 3932160 bytes that may be written here" in said[0]
    assert "would be more than the 93 files there may be here" in said[1]
    assert said[2] == ""


def test_headers_that_never_end_do_not_take_all_memory(place: Place) -> None:
    """An old GNU header of a sparse file goes on in blocks of 21 extents, and says itself
    whether another follows."""
    header = bytearray(entry("sparse")[0].tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:483] = b"0" * 97
    header[482] = 1  # goes on
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    block = b"00000000001\0" * 42 + b"\1" + bytes(7)
    place.tar.write_bytes(gzip.compress(bytes(header) + block * 60_000, 1))
    program = (
        "import sys; from shim import oci_layer; oci_layer._MEMORY = 100 << 20; "
        "sys.exit(oci_layer.main([*sys.argv[1:], '0', '0']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, place.tar, place.root],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "its headers need more than" in done.stderr, done.stderr


def test_nothing_is_unpacked_onto_the_host(place: Place) -> None:
    place.tar.write_bytes(tarred(entry("grit-was-here")))
    with pytest.raises(DiffError, match="this machine's own root"):
        apply(str(place.tar), "/")
    assert not os.path.exists("/grit-was-here")


def test_what_is_not_there_is_named(place: Place) -> None:
    with pytest.raises(DiffError, match=r"nowhere.tar to .*: No such file"):
        apply(str(place.tar.parent / "nowhere.tar"), str(place.root))
    place.tar.write_bytes(tarred())
    with pytest.raises(DiffError, match="nowhere: No such file"):
        apply(str(place.tar), str(place.root / "nowhere"))
    with pytest.raises(DiffError, match="cannot run /nowhere/python"):
        apply(str(place.tar), str(place.root), python="/nowhere/python")


def test_a_helper_that_hangs_or_dies_is_given_up(place: Place) -> None:
    os.mkfifo(place.tar)  # opening it waits for a writer that never comes
    with pytest.raises(DiffError, match=r"not done after 0\.5 s; the root"):
        apply(str(place.tar), str(place.root), timeout=0.5)
    place.tar.unlink()
    suicide = place.root / "python"
    suicide.write_text("#!/bin/sh\nkill -9 $$\n")
    suicide.chmod(0o755)
    with pytest.raises(DiffError, match="killed by signal 9"):
        apply(str(place.tar), str(place.root), python=str(suicide))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_damage_anywhere_is_an_error_or_harmless(data: st.DataObject) -> None:
    layer = bytearray(
        tarred(
            directory("d"),
            entry("d/f", b"x" * 600, pax_headers={"SCHILY.xattr.user.a": "b"}),
            symlink("l", "../outside"),
            hard_link("h", "d/f"),
            entry("d/.wh.g"),
            entry("n" * 120, b"y"),
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        layer[data.draw(st.integers(0, len(layer) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del layer[data.draw(st.integers(0, len(layer))) :]
    with tempfile.TemporaryDirectory() as top:
        (pathlib.Path(top) / "root").mkdir()
        (pathlib.Path(top) / "outside").mkdir()
        tar = pathlib.Path(top) / "tar"
        tar.write_bytes(layer)
        try:
            apply(str(tar), f"{top}/root")
        except DiffError as error:
            assert "Traceback" not in str(error)
        assert list((pathlib.Path(top) / "outside").iterdir()) == []
        assert sorted(os.listdir(top)) == ["outside", "root", "tar"]


# -- apply(diff(A, B)) on A gives B -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Node:
    kind: str  # file, dir, link (symbolic), fifo, char, hard
    value: int  # content, target, number; small, so that trees often agree
    mode: int
    owner: int
    time: int
    attribute: int


NODE = st.builds(
    Node,
    kind=st.sampled_from(["file", "dir", "dir", "dir", "link", "fifo", "char", "hard"]),
    value=st.integers(0, 2),
    mode=st.sampled_from([0o644, 0o755, 0o4755, 0o000]),
    owner=st.sampled_from([0, 1000]),
    time=st.sampled_from([10**18, 10**18 + 1]),
    attribute=st.sampled_from([0, 0, 1]),
)
NAME = st.sampled_from(["a", "b", "c", "\xe9", "w" * 101, "-x", ".h"])
PATH = st.lists(NAME, min_size=1, max_size=3).map("/".join)
TREE = st.dictionaries(PATH, NODE, max_size=9)


def build(root: pathlib.Path, tree: dict[str, Node]) -> None:
    root.mkdir()
    files: list[pathlib.Path] = []
    for name, node in sorted(tree.items()):
        path = root / name
        above = [root / p for p in pathlib.PurePath(name).parents]
        if any(p.is_symlink() or (p.exists() and not p.is_dir()) for p in above):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if node.kind == "hard" and files:
            os.link(files[node.value % len(files)], path)
        elif node.kind == "dir":
            path.mkdir(exist_ok=True)
        elif node.kind == "link":
            path.symlink_to(["a", "../..", "/b/c"][node.value])
        elif node.kind == "fifo":
            os.mkfifo(path)
        elif node.kind == "char":
            os.mknod(path, stat.S_IFCHR, os.makedev(1, [3, 5, 7][node.value]))
        else:
            path.write_bytes(b"content" * node.value)
            files.append(path)
            if node.attribute:
                os.setxattr(path, "user.grit", b"\xff\n")
        os.chown(path, node.owner, node.owner, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(node.mode)
        os.utime(path, ns=(node.time, node.time), follow_symlinks=False)
    for path in [*root.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            os.utime(path, ns=(10**18, 10**18))


def diff(a: pathlib.Path, b: pathlib.Path, opaque: set[str], opaque_last: bool) -> bytes:
    """The layer that makes A into B; the directories in `opaque` are replaced as wholes."""
    old, new = snapshot(a), snapshot(b)

    def below(name: str, top: str) -> bool:
        return name.startswith(top + "/")

    opaque = {n for n in opaque if all(t.get(n) and stat.S_ISDIR(t[n][0]) for t in (old, new))}  # type: ignore[arg-type]
    changed = {
        name
        for name in new
        if new[name] != old.get(name) or name in opaque or any(below(name, top) for top in opaque)
    }
    for name in list(changed):  # all the names of a file, and the directories above
        linked = new[name][6]
        assert isinstance(linked, list)
        changed.update(linked)
    gone = {name for name in old if name not in new and not any(below(name, top) for top in opaque)}
    for name in list(changed | gone):
        changed.update(str(p) for p in pathlib.PurePath(name).parents if str(p) in new)
    entries: list[Entry] = []
    markers: list[Entry] = []
    written: set[str] = set()
    for name in sorted(gone):
        above = os.path.dirname(name)
        if not above or (above in new and stat.S_ISDIR(new[above][0])):  # type: ignore[arg-type]
            entries.append(entry(os.path.join(above, ".wh." + os.path.basename(name))))
    for name in sorted(changed):
        mode, uid, gid, time, what, attributes, linked = new[name]
        assert isinstance(mode, int) and isinstance(time, int) and isinstance(linked, list)
        assert isinstance(attributes, dict)
        path = b / name
        info = tarfile.TarInfo(name)
        info.mode, info.uid, info.gid = stat.S_IMODE(mode), uid, gid  # type: ignore[assignment]
        info.pax_headers = {"mtime": f"{time // 10**9}.{time % 10**9:09}"}
        for key, value in attributes.items():
            info.pax_headers["SCHILY.xattr." + key] = value.decode("utf-8", "surrogateescape")
        data = b""
        earlier = [other for other in linked if other in written]
        if earlier:
            info.type, info.linkname = tarfile.LNKTYPE, earlier[0]
        elif path.is_symlink():
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink(path)
        elif stat.S_ISDIR(mode):
            info.type = tarfile.DIRTYPE
            if name in opaque:
                markers.append(entry(f"{name}/.wh..wh..opq"))
        elif stat.S_ISFIFO(mode):
            info.type = tarfile.FIFOTYPE
        elif stat.S_ISCHR(mode):
            info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, os.minor(what)  # type: ignore[arg-type]
        else:
            assert isinstance(what, bytes)
            data, info.size = what, len(what)
        entries.append((info, data))
        written.add(name)
    return tarred(*(entries + markers if opaque_last else markers + entries))


@settings(max_examples=60, deadline=None)
@given(
    a=TREE,
    b=TREE,
    mixed=st.booleans(),
    opaque=st.sets(PATH, max_size=2),
    opaque_last=st.booleans(),
    pack=st.sampled_from([bytes, gzip.compress, zstandard.ZstdCompressor().compress]),
)
def test_the_difference_of_two_trees_makes_one_the_other(
    a: dict[str, Node],
    b: dict[str, Node],
    mixed: bool,
    opaque: set[str],
    opaque_last: bool,
    pack: object,
) -> None:
    assert callable(pack)
    with tempfile.TemporaryDirectory() as temporary:
        top = pathlib.Path(temporary)
        build(top / "a", a)
        build(top / "b", {**a, **b} if mixed else b)
        (top / "tar").write_bytes(pack(diff(top / "a", top / "b", opaque, opaque_last)))
        assert apply(str(top / "tar"), str(top / "a")) == []
        assert snapshot(top / "a") == snapshot(top / "b")


def test_importing_it_stays_cheap() -> None:
    code = (
        "import sys; before = set(sys.modules); import shim.rootfs_diff; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) <= {"__future__", "shim", "shim.rootfs_diff"}
