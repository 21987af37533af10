"""The checkpoint on disk: whole under its final name or not there at all, and verifiable."""

from __future__ import annotations

import copy
import datetime
import hashlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys

import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shim import checkpoint_dir, digests
from shim.checkpoint_dir import (
    CheckpointDirError,
    Draft,
    ForeignCheckpoint,
    find_checkpoint,
    load,
    rootfs_diff,
    verify,
)
from shim.config import GritOptions
from shim.digests import BLOCK
from shim.manifest import NO_COMPRESSION, File, Manifest, ManifestError

ROOT = pathlib.Path(checkpoint_dir.__file__).parents[1]


def a_manifest() -> Manifest:
    return Manifest(
        container_id="c1",
        namespace="k8s.io",
        image="docker.io/library/busybox:1.36",
        runtime="io.containerd.grit.v1",
        engine="driver",
        driver_version="580.159.04",
        gpus=[{"uuid": "GPU-1", "name": "NVIDIA H100 80GB HBM3"}],
        criu_version="4.1.1",
        kernel="6.18.0",
        hostname="node-1",
        options={"tcp": "established", "file_locks": True, "ghost_limit": 1048576},
        cuda_processes=[{"pid": 7, "vma": [1, 2]}],
        mounts=[
            {"destination": "/a", "path": "/a", "source": "/usr/lib/libcuda.so.1"},
            {"destination": "/b", "path": "/c", "text": "ModifyDeviceFiles: 0\n"},
        ],
        devices=["/dev/nvidia0", "/dev/nvidiactl"],
        phases={"lock": 0.001, "dump": 0.34},
    )


IMAGES = {"inventory.img": b"inventory", "pages-1.img": b"p" * 100_000, "core-1.img": b""}


def dump_into(draft: Draft) -> None:
    for name, data in IMAGES.items():
        pathlib.Path(draft.path, name).write_bytes(data)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def published(final: pathlib.Path) -> Manifest:
    draft = Draft.begin(str(final))
    dump_into(draft)
    return draft.publish(a_manifest())


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "checkpoint"


def test_a_draft_is_private_beside_the_final_and_on_its_file_system(place: pathlib.Path) -> None:
    draft = Draft.begin(str(place))
    path = pathlib.Path(draft.path)
    assert path.parent == place.parent and path.name.startswith(".checkpoint.grit-partial-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert not place.exists()
    draft.discard()


@pytest.mark.parametrize("made_by_containerd", [False, True])
def test_publishing_makes_a_whole_checkpoint(place: pathlib.Path, made_by_containerd: bool) -> None:
    if made_by_containerd:
        place.mkdir()
    draft = Draft.begin(str(place))
    dump_into(draft)
    assert not place.exists() or not any(place.iterdir())
    manifest = draft.publish(a_manifest())

    assert [p.name for p in place.parent.iterdir()] == ["checkpoint"]
    found = contents(place)
    written = found.pop("grit.json")
    assert found == IMAGES
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in place.iterdir()} == {0o600}
    assert manifest.files == {
        name: File(len(data), hashlib.sha256(data).hexdigest()) for name, data in IMAGES.items()
    }
    assert datetime.datetime.fromisoformat(manifest.created).tzinfo == datetime.UTC
    assert manifest.phases.keys() == {"lock", "dump", "checksums"}
    assert load(str(place)) == manifest == Manifest.decode(written, "x")
    assert verify(str(place), manifest) == []
    draft.discard()
    assert contents(place).keys() == {*IMAGES, "grit.json"}


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("where", ["place", "within"])
def test_what_is_given_up_stays_a_draft(
    request: pytest.FixtureRequest, where: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever publishing ends: the disk hung, before it got its name or in the middle of that."""
    final: pathlib.Path = request.getfixturevalue(where)
    draft = Draft.begin(str(final))
    dump_into(draft)
    real = getattr(os, call)

    def late(*words: str) -> None:
        real(*words)
        draft.give_up()

    with monkeypatch.context() as patch:
        patch.setattr(os, call, late)
        with pytest.raises(CheckpointDirError, match="was given up"):
            draft.publish(a_manifest())
    assert not draft.published
    assert contents(pathlib.Path(draft.path)).keys() == {*IMAGES, "grit.json"}
    assert not final.exists() or not contents(final)
    draft.discard()
    assert not final.exists() or not list(final.iterdir())
    assert [one for one in final.parent.iterdir() if one != final] == []


def test_what_was_published_cannot_be_given_up(place: pathlib.Path) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    draft.publish(a_manifest())
    draft.give_up()
    assert draft.published


def test_a_manifest_is_readable_json(place: pathlib.Path) -> None:
    published(place)
    document = json.loads((place / "grit.json").read_bytes())
    assert list(document) == [
        "format",
        "self_check",
        "created",
        "container",
        "runtime",
        "engine",
        "driver",
        "gpus",
        "criu",
        "kernel",
        "hostname",
        "cpu",
        "options",
        "cuda_processes",
        "mounts",
        "devices",
        "phases",
        "files",
        "sha256_of_the_above",
    ]
    assert document["format"] == 1
    assert document["container"]["id"] == "c1"


def test_a_discarded_draft_leaves_nothing(place: pathlib.Path) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    pathlib.Path(draft.path, "sub").mkdir()
    draft.discard()
    draft.discard()
    assert list(place.parent.iterdir()) == []
    with pytest.raises(CheckpointDirError, match="was published or discarded"):
        draft.publish(a_manifest())


def test_a_directory_in_use_is_refused_and_left_alone(place: pathlib.Path) -> None:
    place.mkdir()
    for name in "abcde":
        (place / name).write_text(name)
    with pytest.raises(CheckpointDirError, match=r"it is not empty \(it has a, b, c and 2 more\)"):
        Draft.begin(str(place))
    assert [p.name for p in place.parent.iterdir()] == ["checkpoint"]
    assert len(list(place.iterdir())) == 5


def test_the_final_path_may_be_a_link_to_an_empty_directory(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    published(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "grit.json").exists()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: p.write_text("x"), "Not a directory"),
        (lambda p: shutil.rmtree(p.parent), "there is no directory .*; create it"),
    ],
)
def test_a_final_path_that_cannot_be(tmp_path: pathlib.Path, make: object, reason: str) -> None:
    place = tmp_path / "dir" / "checkpoint"
    place.parent.mkdir()
    assert callable(make)
    make(place)
    with pytest.raises(CheckpointDirError, match=reason):
        Draft.begin(str(place))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: (p / "inventory.img").unlink(), "no inventory.img: CRIU did not finish"),
        (lambda p: (p / "sub").mkdir(), "sub is not a plain file"),
        (lambda p: (p / "link").symlink_to("core-1.img"), "link is not a plain file"),
        (lambda p: os.mkfifo(p / "fifo"), "fifo is not a plain file"),
        (lambda p: (p / "grit.json").touch(), "has a grit.json already"),
        (shutil.rmtree, "No such file"),
    ],
)
def test_what_is_no_checkpoint_is_not_published(
    place: pathlib.Path, spoil: object, reason: str
) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    assert callable(spoil)
    spoil(pathlib.Path(draft.path))
    with pytest.raises(CheckpointDirError, match=reason):
        draft.publish(a_manifest())
    assert not place.exists()
    draft.discard()
    assert list(place.parent.iterdir()) == []


def test_a_final_directory_filled_meanwhile_is_not_overwritten(place: pathlib.Path) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    place.mkdir()
    (place / "other").touch()
    with pytest.raises(CheckpointDirError, match="not empty"):
        draft.publish(a_manifest())
    draft.discard()
    assert [p.name for p in place.parent.iterdir()] == ["checkpoint"]
    assert [p.name for p in place.iterdir()] == ["other"]


OWNER = """
import sys
from shim.checkpoint_dir import Draft
draft = Draft.begin(sys.argv[1])
open(draft.path + "/pages-1.img", "wb").write(b"half")
print(draft.path, flush=True)
sys.stdin.read()
"""


def another_owner(final: pathlib.Path) -> tuple[subprocess.Popen[str], pathlib.Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(final)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, pathlib.Path(process.stdout.readline().strip())


def test_drafts_of_the_dead_are_removed_those_of_the_living_kept(place: pathlib.Path) -> None:
    owner, path = another_owner(place)
    with owner:
        mine = Draft.begin(str(place))
        assert (path / "pages-1.img").read_bytes() == b"half"
        mine.discard()
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    mine = Draft.begin(str(place))
    assert not path.exists()
    mine.discard()


def test_only_names_of_ours_are_taken_for_drafts(place: pathlib.Path) -> None:
    kept = [
        ".other.grit-partial-0123456789abcdef",
        ".checkpoint.grit-partial-0123456789abcde",
        ".checkpoint.grit-partial-0123456789abcdeg",
        ".checkpoint.grit-partial-0123456789abcdef0",
        "checkpoint.grit-partial-0123456789abcdef",
    ]
    for name in kept:
        (place.parent / name).mkdir()
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").touch()
    (place.parent / ".checkpoint.grit-partial-aaaaaaaaaaaaaaaa").symlink_to(elsewhere)
    (place.parent / ".checkpoint.grit-partial-bbbbbbbbbbbbbbbb").touch()
    (place.parent / ".checkpoint.grit-partial-cccccccccccccccc").mkdir()
    Draft.begin(str(place)).discard()
    names = {p.name for p in place.parent.iterdir()}
    assert names >= {*kept, "elsewhere"}
    assert (elsewhere / "file").exists()
    assert ".checkpoint.grit-partial-cccccccccccccccc" not in names


def test_a_final_name_too_long_to_lengthen(tmp_path: pathlib.Path) -> None:
    place = tmp_path / ("n" * 255)
    with pytest.raises(CheckpointDirError, match="File name too long"):
        Draft.begin(str(place))
    place.mkdir()
    manifest = published(place)
    assert verify(str(place), manifest) == []
    assert {p.name for p in place.iterdir()} == {*IMAGES, "grit.json"}


@pytest.fixture
def within(tmp_path: pathlib.Path) -> pathlib.Path:
    """A final directory whose draft has to be made inside it."""
    place = tmp_path / ("n" * 255)
    place.mkdir()
    return place


def test_a_draft_within_leaves_nothing_when_discarded(within: pathlib.Path) -> None:
    draft = Draft.begin(str(within))
    assert pathlib.Path(draft.path).parent == within
    dump_into(draft)
    with pytest.raises(ManifestError, match="writing it was cut short"):
        load(str(within))
    with pytest.raises(CheckpointDirError, match="another checkpoint is just being written"):
        Draft.begin(str(within))
    draft.discard()
    assert list(within.iterdir()) == []


@pytest.mark.parametrize("step", range(len(IMAGES) + 2))
def test_publishing_within_is_undone_when_it_fails_at_any_step(
    within: pathlib.Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft.begin(str(within))
    dump_into(draft)
    rename, done = os.rename, 0

    def failing(source: str, target: str) -> None:
        nonlocal done
        # A crash here must not look like a checkpoint to anyone.
        with pytest.raises(ManifestError, match="cut short"):
            load(str(within))
        if done == step:
            raise OSError(28, "No space left on device")
        done += 1
        rename(source, target)

    def no_rmdir(path: str) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        patch.setattr(os, "rmdir", no_rmdir)
        with pytest.raises(CheckpointDirError, match=r"cannot publish .*(No space|Input/output)"):
            draft.publish(a_manifest())
    draft.discard()
    assert list(within.iterdir()) == []


def test_a_draft_within_left_by_the_dead_is_removed(within: pathlib.Path) -> None:
    owner, path = another_owner(within)
    with owner:
        assert path.parent == within
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    published(within)
    assert {p.name for p in within.iterdir()} == {*IMAGES, "grit.json"}


def in_own_mounts(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-m", "--propagation", "private", "sh", "-ec", script, "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


can_mount = pytest.mark.skipif(
    os.geteuid() != 0 or in_own_mounts("true").returncode != 0, reason="needs root to mount"
)

PUBLISH = """
import pathlib, sys
from tests.test_checkpoint_dir import *
manifest = published(pathlib.Path(sys.argv[1]))
assert verify(sys.argv[1], manifest) == []
print(*sorted(os.listdir(sys.argv[1])))
"""


@can_mount
@pytest.mark.parametrize(
    "mount",
    [
        'mount -t tmpfs grit "$1/a b"',
        'mount --bind "$1/other" "$1/a b"',  # one file system: os.path.ismount() sees nothing
        # ... and its parent is read-only:
        'mount --bind "$1" "$1"; cd "$1"; mount --bind "$1/other" "$1/a b";'
        ' mount -o remount,bind,ro "$1"; cd "$OLDPWD"',
    ],
)
def test_a_mount_point_is_published_within(tmp_path: pathlib.Path, mount: str) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "other").mkdir()
    script = mount + '; exec "$2" -c "$3" "$1/a b"'
    done = in_own_mounts(script, str(tmp_path), sys.executable, PUBLISH)
    assert done.stderr == ""
    assert done.stdout.split() == sorted([*IMAGES, "grit.json"])
    assert {p.name for p in tmp_path.iterdir()} == {"a b", "other"}


@can_mount
def test_a_full_disk_is_an_error_that_says_so(tmp_path: pathlib.Path) -> None:
    code = """
import sys
from tests.test_checkpoint_dir import *
draft = Draft.begin(sys.argv[1] + "/checkpoint")
for name in IMAGES:
    pathlib.Path(draft.path, name).touch()
try:
    with open(draft.path + "/pages-1.img", "wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
except OSError:
    pass
try:
    draft.publish(a_manifest())
except CheckpointDirError as error:
    print(error)
draft.discard()
print(os.listdir(sys.argv[1]))
"""
    script = 'mount -t tmpfs -o size=64k grit "$1"; exec "$2" -c "$3" "$1"'
    done = in_own_mounts(script, str(tmp_path), sys.executable, code)
    assert done.stderr == ""
    message, left = done.stdout.splitlines()
    assert message.startswith(f"cannot publish the checkpoint {tmp_path}/checkpoint: No space left")
    assert left == "[]"


def test_what_differs_is_named(place: pathlib.Path) -> None:
    manifest = published(place)
    (place / "core-1.img").unlink()
    (place / "pages-1.img").write_bytes(b"p" * 99_999 + b"q")
    (place / "inventory.img").write_bytes(b"short")
    (place / "new.img").touch()
    problems = verify(str(place), manifest)
    assert [(p.name, p.kind) for p in problems] == [
        ("core-1.img", "missing"),
        ("inventory.img", "size"),
        ("new.img", "extra"),
        ("pages-1.img", "checksum"),
    ]
    assert str(problems[1]) == "inventory.img: has 5 bytes; the manifest says 9"
    assert "has SHA-256 " in str(problems[3])
    assert [p.kind for p in verify(str(place), manifest, contents=False)] == [
        "missing",
        "size",
        "extra",
    ]
    (place / "pages-1.img").unlink()
    (place / "pages-1.img").symlink_to("/etc/passwd")
    assert verify(str(place), manifest)[-1].kind == "not-a-file"
    with pytest.raises(CheckpointDirError, match="No such file"):
        verify(str(place / "nowhere"), manifest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_one_changed_bit_is_always_found(tmp_path: pathlib.Path, data: st.DataObject) -> None:
    place = tmp_path / "checkpoint"
    manifest = load(str(place)) if place.exists() else published(place)
    name = data.draw(st.sampled_from(["inventory.img", "pages-1.img"]))
    was = (place / name).read_bytes()
    at = data.draw(st.integers(0, len(was) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    (place / name).write_bytes(was[:at] + bytes([was[at] ^ bit]) + was[at + 1 :])
    assert [(p.name, p.kind) for p in verify(str(place), manifest)] == [(name, "checksum")]
    (place / name).write_bytes(was)
    assert verify(str(place), manifest) == []


def test_images_without_a_manifest_are_foreign(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ManifestError, match=r"neither grit.json nor inventory.img") as caught:
        load(str(tmp_path))
    assert not isinstance(caught.value, ForeignCheckpoint)
    (tmp_path / "inventory.img").touch()
    with pytest.raises(ForeignCheckpoint, match="another tool wrote it"):
        load(str(tmp_path))
    with pytest.raises(CheckpointDirError, match=r"cannot read the checkpoint .*: No such file"):
        load(str(tmp_path / "nowhere"))


def test_a_manifest_that_is_not_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "grit.json").symlink_to("/etc/passwd")
    with pytest.raises(ManifestError, match=r"grit.json: cannot be read: Too many levels"):
        load(str(tmp_path))
    (tmp_path / "grit.json").unlink()
    (tmp_path / "grit.json").mkdir()
    with pytest.raises(ManifestError, match=r"grit.json: cannot be read: Is a directory"):
        load(str(tmp_path))
    (tmp_path / "grit.json").rmdir()
    os.mkfifo(tmp_path / "grit.json")
    with pytest.raises(ManifestError, match="is not valid JSON"):
        load(str(tmp_path))


def document() -> dict[str, object]:
    manifest = a_manifest()
    manifest.created = "2026-11-23T12:00:00Z"
    manifest.files = {"inventory.img": File(1, "0" * 64)}
    value = json.loads(manifest.encode())
    assert isinstance(value, dict)
    del value["self_check"], value["sha256_of_the_above"]  # as a change by hand must
    return value


def with_value(path: list[str], value: object) -> bytes:
    changed: dict[str, object] = document()
    inner = changed
    for key in path[:-1]:
        step = inner[key]
        assert isinstance(step, dict)
        inner = step
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return json.dumps(changed).encode()


def mount(**values: object) -> dict[str, object]:
    return {"destination": "/a", "path": "/a", "source": "/usr/lib/libcuda.so.1", **values}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            ["format"],
            5,
            "is of format 5, and this grit reads formats 1 to 4; restore it with the version",
        ),
        (["format"], "1", "format must be a whole number"),
        (["format"], True, "format must be a whole number"),
        (["format"], ..., "format is missing; it must be a whole number"),
        (["created"], "yesterday", "created must be a time as in RFC 3339"),
        (["container"], [], "container must be an object"),
        (["container", "id"], ..., "container.id is missing; it must be a string"),
        (["container", "image"], 5, "container.image must be a string"),
        (["driver"], 5, "driver must be a string"),
        (["driver"], ..., "driver is missing; it must be a string or null"),
        (["gpus"], {}, "gpus must be an array of objects"),
        (["gpus"], [1], "gpus must be an array of objects"),
        (["gpus"], [{"uuid": "a"}], r"gpus\[0\].name is missing; it must be a string"),
        (["cuda_processes"], None, "cuda_processes must be an array of objects"),
        (["mounts"], [1], "mounts must be an array of objects"),
        (["mounts"], [{"destination": "/a"}], r"mounts\[0\].path is missing; it must be a string"),
        (["mounts"], [mount(path="a")], r"mounts\[0\].path must be an absolute path without"),
        (["mounts"], [mount(path="/x]:/etc")], r"mounts\[0\].path must be .* without .. and ]"),
        (["mounts"], [mount(path="/a/../b")], r"mounts\[0\].path must be an absolute path"),
        (["mounts"], [mount(source=5)], r"mounts\[0\].source must be a string"),
        (["devices"], ["/dev/nvidia0", 1], "devices must be an array of strings"),
        (["options", "tcp"], [], "options.tcp must be true, false, a whole number or a string"),
        (["options", "x"], 1.5, "options.x must be true, false"),
        (["phases", "dump"], "1s", "phases.dump must be a number"),
        (["files"], {}, "files.inventory.img is missing"),
        (["files", "a"], 3, "files.a must be an object"),
        (["files", "a"], {"size": -1, "sha256": "0" * 64}, "files.a.size must be a whole number"),
        (["files", "a"], {"size": 1, "sha256": "0" * 63}, "files.a.sha256 must be 64 lower-case"),
        (["files", "a"], {"size": 1, "sha256": "A" * 64}, "files.a.sha256 must be 64 lower-case"),
        (["files", "a"], {"size": 1, "xxh3_128": "0" * 64}, "files.a.xxh3_128 must be 32 lower"),
        (["files", "a"], {"size": 1}, "files.a.sha256 is missing"),
        (["files", "../a"], {}, r"files.'../a' is not the name of a file within"),
        (["files", ".."], {}, "is not the name of a file within"),
        (["files", "grit.json"], {}, "is not the name of a file within"),
        (["phases", "dump"], float("nan"), "is not valid JSON: NaN is not JSON"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(
    path: list[str], value: object, message: str
) -> None:
    with pytest.raises(ManifestError, match="^grit.json: .*" + message):
        Manifest.decode(with_value(path, value), "grit.json")


def test_every_single_bit_of_a_manifest_is_protected() -> None:
    manifest = a_manifest()
    manifest.created = "2026-11-23T12:00:00Z"
    manifest.files = {"inventory.img": File(1, "0" * 64)}
    data = manifest.encode()
    assert Manifest.decode(data, "x") == manifest
    for at in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(ManifestError):
            Manifest.decode(bytes(flipped), "x")
    for cut in range(len(data)):
        with pytest.raises(ManifestError):
            Manifest.decode(data[:cut], "x")
    with pytest.raises(ManifestError, match=r"^x: does not match the checksum in its last line"):
        Manifest.decode(data.replace(b"c1", b"c2"), "x")
    with pytest.raises(ManifestError, match="remove self_check and sha256_of_the_above from it"):
        Manifest.decode(json.dumps(json.loads(data)).encode(), "x")


def test_keys_of_a_later_grit_are_passed_over() -> None:
    assert Manifest.decode(with_value(["later"], [1]), "x").container_id == "c1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(data=st.data())
def test_any_change_gives_a_manifest_or_a_manifest_error(data: st.DataObject) -> None:
    value = copy.deepcopy(document())
    here: object = value
    while True:
        assert isinstance(here, dict | list)
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = data.draw(st.sampled_from(keys))
        below = here[key]
        if isinstance(below, dict | list) and below and data.draw(st.booleans()):
            here = below
            continue
        here[key] = data.draw(JSON)
        break
    try:
        manifest = Manifest.decode(json.dumps(value).encode(), "x")
    except ManifestError:
        return
    assert Manifest.decode(manifest.encode(), "x") == manifest


@given(st.binary() | st.text().map(str.encode) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_bytes_give_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError):
        Manifest.decode(data, "x")


@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 10_000, b'{"format": ' + b"9" * 5000])
def test_absurd_json_is_a_manifest_error(data: bytes) -> None:
    with pytest.raises(ManifestError, match="is not valid JSON"):
        Manifest.decode(data, "x")


def test_a_huge_manifest_is_not_read(tmp_path: pathlib.Path) -> None:
    with (tmp_path / "grit.json").open("wb") as file:
        file.truncate(checkpoint_dir.MAX_MANIFEST + 1)
    with pytest.raises(ManifestError, match="is larger than"):
        load(str(tmp_path))


def images(directory: pathlib.Path) -> str:
    directory.mkdir(parents=True)
    (directory / "inventory.img").touch()
    return str(directory)


def test_the_annotation_finds_a_checkpoint(tmp_path: pathlib.Path) -> None:
    where = str(tmp_path)
    assert find_checkpoint(where, "web") is None
    assert find_checkpoint(where + "/nowhere", "web") is None
    (tmp_path / "inventory.img").touch()
    assert find_checkpoint(where, "web") == where
    (tmp_path / "inventory.img").unlink()
    top = images(tmp_path / "checkpoint")
    assert find_checkpoint(where, "web") == find_checkpoint(where, None) == top
    own = images(tmp_path / "web" / "checkpoint")
    assert find_checkpoint(where, "web") == own
    assert find_checkpoint(where, "db") == find_checkpoint(where, None) == top


def test_a_container_may_be_named_checkpoint(tmp_path: pathlib.Path) -> None:
    own = images(tmp_path / "checkpoint" / "checkpoint")
    assert find_checkpoint(str(tmp_path), "checkpoint") == own
    assert find_checkpoint(str(tmp_path), "web") is None


@pytest.mark.parametrize("where", ["checkpoint", "web/checkpoint"])
def test_a_checkpoint_that_is_not_whole_is_not_a_missing_one(
    tmp_path: pathlib.Path, where: str
) -> None:
    (tmp_path / where).mkdir(parents=True)
    (tmp_path / where / "pages-1.img").touch()
    with pytest.raises(CheckpointDirError, match="is not a whole checkpoint: it has no inventory"):
        find_checkpoint(str(tmp_path), "web")


@pytest.mark.parametrize("name", ["..", ".", "../web", "/web", "a/b"])
def test_a_container_name_leads_nowhere_else(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(CheckpointDirError, match="is not a container's name"):
        find_checkpoint(str(tmp_path), name)


def test_the_rootfs_diff_lies_beside(tmp_path: pathlib.Path) -> None:
    inner = images(tmp_path / "checkpoint")
    assert rootfs_diff(inner) is None
    (tmp_path / "rootfs-diff.tar").touch()
    assert rootfs_diff(inner) == rootfs_diff(inner + "/") == str(tmp_path / "rootfs-diff.tar")
    assert rootfs_diff(images(tmp_path / "ctrd-checkpoint123")) is None


BIG = 2 * BLOCK + 5
BY_HAND = "split -b 64M --filter='openssl dgst -sha256 -binary' pages-1.img | sha256sum"
"""docs/checkpoint-layout.md"""


@pytest.fixture
def big(place: pathlib.Path) -> pathlib.Path:
    """A checkpoint with a file of three blocks; its path."""
    draft = Draft.begin(str(place))
    dump_into(draft)
    with open(pathlib.Path(draft.path) / "pages-1.img", "wb") as file:
        file.truncate(BIG)
        for at in (0, BLOCK, BIG - 1):
            os.pwrite(file.fileno(), b"x", at)
    draft.publish(a_manifest())
    return place / "pages-1.img"


def test_a_large_file_has_a_digest_of_blocks(big: pathlib.Path) -> None:
    entry = json.loads((big.parent / "grit.json").read_bytes())["files"]["pages-1.img"]
    done = subprocess.run(
        ["sh", "-c", BY_HAND], cwd=big.parent, capture_output=True, text=True, check=True
    )
    assert entry == {"size": BIG, "sha256_of_64m_blocks": done.stdout.split()[0]}
    assert verify(str(big.parent), load(str(big.parent))) == []


@pytest.mark.parametrize("at", [1, BLOCK - 1, BLOCK + 1, 2 * BLOCK, BIG - 1])
def test_a_flipped_byte_in_any_block_is_found(big: pathlib.Path, at: int) -> None:
    with open(big, "r+b") as file:
        os.pwrite(file.fileno(), b"!", at)
    (problem,) = verify(str(big.parent), load(str(big.parent)))
    assert (problem.name, problem.kind) == ("pages-1.img", "checksum")


def test_a_quick_digest_is_that_of_the_contents_or_of_the_blocks_digests(
    place: pathlib.Path,
) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    data = os.urandom(5) + bytes(BLOCK) + os.urandom(5)
    (pathlib.Path(draft.path) / "pages-1.img").write_bytes(data)
    draft.publish(a_manifest(), algorithm=digests.XXH3)

    def digest(data: bytes) -> bytes:
        return xxhash.xxh3_128(data).digest()

    written = json.loads((place / "grit.json").read_bytes())
    assert written["format"] == 2  # no grit from before takes it for one it can check
    inventory = (place / "inventory.img").read_bytes()
    assert written["files"]["inventory.img"] == {
        "size": len(inventory),
        "xxh3_128": digest(inventory).hex(),
    }
    assert written["files"]["pages-1.img"] == {
        "size": len(data),
        "xxh3_128_of_64m_blocks": digest(digest(data[:BLOCK]) + digest(data[BLOCK:])).hex(),
    }
    manifest = load(str(place))
    assert verify(str(place), manifest) == []
    with open(place / "pages-1.img", "r+b") as file:
        os.pwrite(file.fileno(), b"!", BLOCK // 2)
    (problem,) = verify(str(place), manifest)
    assert str(problem).startswith("pages-1.img: has XXH3 ")


def test_one_of_sha256_is_as_it_was_before_there_was_a_choice(place: pathlib.Path) -> None:
    published(place)
    written = json.loads((place / "grit.json").read_bytes())
    assert written["format"] == 1
    assert all(entry.keys() == {"size", "sha256"} for entry in written["files"].values())


@pytest.mark.parametrize("algorithm", [digests.SHA256, digests.XXH3])
@pytest.mark.parametrize("encrypted", [False, True], ids=["clear", "encrypted"])
@pytest.mark.parametrize(("kind", "number"), [("zstd", 4), (NO_COMPRESSION, None), ("", None)])
def test_no_grit_from_before_takes_compressed_memory_for_memory(
    kind: str, number: int | None, encrypted: bool, algorithm: str
) -> None:
    manifest = a_manifest()
    manifest.created = "2026-11-28T12:00:00+00:00"
    manifest.files = {"inventory.img": File(1, "0" * (32 if algorithm == digests.XXH3 else 64))}
    manifest.files["inventory.img"].algorithm = algorithm
    manifest.encryption = {"algorithm": "a", "key": "b", "id": "c"} if encrypted else {}
    manifest.compression = {"algorithm": kind, "why": "it is faster"} if kind else {}
    written = manifest.encode()
    otherwise = 3 if encrypted else 2 if algorithm == digests.XXH3 else 1
    assert json.loads(written)["format"] == (number or otherwise)
    assert Manifest.decode(written, "x") == manifest
    changed = json.loads(written)
    changed |= {"format": 4, "compression": {"algorithm": kind}}
    del changed["self_check"], changed["sha256_of_the_above"]
    with pytest.raises(ManifestError, match=r"compression\.why is missing"):
        Manifest.decode(json.dumps(changed).encode(), "x")


def test_without_xxhash_digests_are_sha256_and_others_cannot_be_checked(
    place: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    draft = Draft.begin(str(place))
    dump_into(draft)
    manifest = draft.publish(a_manifest(), algorithm=digests.algorithm(GritOptions()))
    monkeypatch.setitem(sys.modules, "xxhash", None)
    before = list(sys.path)

    (problem,) = verify(str(place), manifest)
    assert problem.name == "grit.json"
    assert "cannot be checked: this Python has no xxhash: install it" in str(problem)
    assert verify(str(place), manifest, contents=False) == []
    assert digests.algorithm(GritOptions()) == digests.SHA256
    assert digests.algorithm(GritOptions(checksum="sha256")) == digests.SHA256
    assert capfd.readouterr().err.count("level=warning") == 1
    assert sys.path == before


def test_importing_it_stays_cheap() -> None:
    """It is loaded into the daemon at the first Checkpoint or restore."""
    code = (
        "import sys; before = set(sys.modules); import shim.checkpoint_dir; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert set(done.stdout.split()) <= {
        "__future__",
        "shim",
        "shim.checkpoint_dir",
        "shim.digests",
        "shim.manifest",
    }


@pytest.mark.parametrize("within", [False, True])
def test_a_checkpoint_can_be_withdrawn(
    place: pathlib.Path, within: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if within:
        place.mkdir()
        monkeypatch.setattr(checkpoint_dir, "_is_mount_point", lambda path: True)
    draft = Draft.begin(str(place))
    draft.withdraw()  # there is nothing yet
    dump_into(draft)
    draft.publish(a_manifest())
    assert (place / "grit.json").exists()
    draft.withdraw()
    draft.discard()
    assert [p.name for p in place.parent.rglob("*")] == (["checkpoint"] if within else [])
    assert published(place).files
