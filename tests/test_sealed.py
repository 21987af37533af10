"""Encrypted checkpoints: they come back as they were, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import checkpoint_dir, sealed
from shim.checkpoint_dir import CheckpointDirError, Draft
from shim.config import ConfigError, GritOptions, parse
from shim.sealed import CHUNK, MAGIC, Key, SealError
from tests.test_checkpoint_dir import a_manifest

KEY = Key(b"k" * 32, "/etc/grit/key")
HEAD = len(MAGIC) + 20
TAG = 16


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The working directory, with an empty `plain`, `sealed` and `opened`."""
    for name in ("plain", "sealed", "opened"):
        (tmp_path / name).mkdir()
    return tmp_path


def seal(three: Path, *names: str, checkpoint: str = "one") -> None:
    sealed.seal_all(str(three / "plain"), str(three / "sealed"), names, KEY, checkpoint)


def opened(three: Path, name: str, *, by: Key = KEY, checkpoint: str = "one") -> bytes:
    (three / "opened" / name).unlink(missing_ok=True)
    sealed.open_all(str(three / "sealed"), str(three / "opened"), [name], by, checkpoint)
    return (three / "opened" / name).read_bytes()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 6 * CHUNK + 5])
def test_comes_back(three: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_PART", 2)
    data = os.urandom(size)
    (three / "plain/a").write_bytes(data)
    seal(three, "a")
    stored = (three / "sealed/a").read_bytes()
    assert len(stored) == HEAD + size + TAG * max(1, -(-size // CHUNK))
    assert size < 16 or data[:16] not in stored
    assert opened(three, "a") == data
    assert (three / "opened/a").stat().st_mode & 0o777 == 0o600
    assert (three / "sealed/a").stat().st_mode & 0o777 == 0o600


def test_the_same_twice_is_not_to_be_told_to_be(three: Path) -> None:
    for name in ("a", "b"):
        (three / "plain" / name).write_bytes(b"same" * 100)
    seal(three, "a", "b")
    first, second = ((three / "sealed" / name).read_bytes() for name in ("a", "b"))
    assert first[HEAD:] != second[HEAD:]


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


ONE = CHUNK + TAG
DAMAGE = {
    "salt": lambda data: flipped(data, len(MAGIC)),
    "first chunk": lambda data: flipped(data, HEAD),
    "tag": lambda data: flipped(data, HEAD + ONE - 1),
    "last byte": lambda data: flipped(data, len(data) - 1),
    "last byte gone": lambda data: data[:-1],
    "last chunk gone": lambda data: data[: HEAD + 2 * ONE],
    "all chunks gone": lambda data: data[:HEAD],
    "more after it": lambda data: data + b"x",
    "a chunk again": lambda data: data + data[HEAD : HEAD + ONE],
    "chunks swapped": lambda data: (
        data[:HEAD]
        + data[HEAD + ONE : HEAD + 2 * ONE]
        + data[HEAD : HEAD + ONE]
        + data[HEAD + 2 * ONE :]
    ),
    "magic": lambda data: flipped(data, 0),
    "nothing": lambda data: b"",
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_damage_is_refused_by_name(three: Path, kind: str) -> None:
    (three / "plain/pages-1.img").write_bytes(os.urandom(2 * CHUNK + 100))
    seal(three, "pages-1.img")
    path = three / "sealed/pages-1.img"
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(SealError, match=r"^pages-1\.img: "):
        opened(three, "pages-1.img")


def test_anothers_file_is_refused(three: Path) -> None:
    (three / "plain/a").write_bytes(b"hello")
    seal(three, "a")
    with pytest.raises(SealError, match="a: cannot be decrypted from byte 0 on"):
        opened(three, "a", checkpoint="two")
    with pytest.raises(SealError, match="a: cannot be decrypted"):
        opened(three, "a", by=Key(b"K" * 32, "other"))
    (three / "sealed/a").rename(three / "sealed/b")
    with pytest.raises(SealError, match="b: cannot be decrypted"):
        opened(three, "b")


def key_file(tmp_path: Path, data: bytes, mode: int = 0o600) -> GritOptions:
    path = tmp_path / f"key-{len(data)}-{mode:o}-{data[:1].hex()}"
    path.write_bytes(data)
    path.chmod(mode)
    return GritOptions(encryption_key_file=str(path))


def command(*argv: str) -> GritOptions:
    return GritOptions(encryption_key_command=argv)


def test_where_the_key_comes_from(tmp_path: Path) -> None:
    assert sealed.key(GritOptions()) is None
    found = [
        sealed.key(key_file(tmp_path, bytes(range(32)))),
        sealed.key(key_file(tmp_path, bytes(range(32)).hex().encode() + b"\n")),
        sealed.key(command("/bin/echo", bytes(range(32)).hex().upper())),
        sealed.key(command("/bin/cat", str(tmp_path / "key-32-600-00"))),
    ]
    assert {one.secret for one in found if one} == {bytes(range(32))}
    assert len({one.identity for one in found if one}) == 1
    assert bytes(range(32)).hex() not in repr(found)


def test_no_key_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "_COMMAND_SECONDS", 0.01)
    both = GritOptions(encryption_key_file="/k", encryption_key_command=("/bin/true",))
    for settings, said in (
        (both, "both set"),
        (GritOptions(encryption_key_file="/no/key"), "the key /no/key cannot be read"),
        (key_file(tmp_path, b"k" * 32, 0o640), "may be read by others"),
        (key_file(tmp_path, b"k" * 31), "must be 32 bytes, or 64 hexadecimal digits"),
        (key_file(tmp_path, b"g" * 64), "and has 64 bytes"),
    ):
        with pytest.raises(CheckpointDirError, match=said):
            sealed.key(settings)
    with pytest.raises(SealError, match="did not end within"):
        sealed.key(command("/bin/sleep", "60"))
    monkeypatch.setattr(sealed, "_COMMAND_SECONDS", 30)
    for settings, said in (
        (command("/no/program"), "/no/program cannot be run: No such file"),
        (command("/bin/true"), "what /bin/true printed is no key"),
        (command("/bin/sh", "-c", "echo vault is sealed >&2; exit 3"), "status 3: vault is sealed"),
        (command("/bin/sh", "-c", "kill -9 $$"), "signal 9: it said nothing"),
    ):
        with pytest.raises(SealError, match=said):
            sealed.key(settings)


def test_nothing_is_imported_for_it_where_it_is_off() -> None:
    code = (
        "import sys; from shim import checkpoint, restore, sealed; from shim.config import "
        "GritOptions; sealed.key(GritOptions()); print('cryptography' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"


def test_a_new_key_is_for_new_checkpoints(tmp_path: Path) -> None:
    old, new = (key_file(tmp_path, (c * 32).encode()).encryption_key_file for c in "on")
    assert old
    before = sealed.key(GritOptions(encryption_key_file=old))
    assert before
    both = GritOptions(encryption_key_file=new, old_encryption_keys=(old,))
    now = sealed.key(both)
    assert now
    assert now.identity != before.identity
    for one in (before, now):
        assert sealed.key_for(both, one.identity).secret == one.secret
    with pytest.raises(SealError, match=f"the key is {before.identity}, and those here are .*/key"):
        sealed.key_for(GritOptions(encryption_key_file=new), before.identity)
    with pytest.raises(SealError, match="names none: set encryption_key_file"):
        sealed.key_for(GritOptions(), before.identity)


def test_what_grit_toml_may_say() -> None:
    text = '[grit]\nencryption_key_command = ["/usr/bin/vault", "read", "k"]\n'
    assert parse(text, "x")[1].encryption_key_command == ("/usr/bin/vault", "read", "k")
    for value in ('"/usr/bin/vault"', '["vault"]', "[1]"):
        with pytest.raises(ConfigError, match="a program's absolute path and its arguments"):
            parse(f"[grit]\nencryption_key_command = {value}\n", "x")


def a_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool) -> tuple[Draft, Path]:
    """One that is to be encrypted, with all that CRIU writes; and where it will be. With the plain
    files goes nothing else than they."""
    monkeypatch.setattr(checkpoint_dir, "_is_mount_point", lambda path: mounted)
    (tmp_path / "stored").mkdir()
    (tmp_path / "scratch").mkdir()
    final = tmp_path / "stored/checkpoint"
    final.mkdir()
    draft = Draft.begin(str(final), KEY, str(tmp_path / "scratch"))
    for name, data in PLAIN.items():
        Path(draft.images, name).write_bytes(data)
    return draft, final


PLAIN = {"inventory.img": b"secret 1", "pages-1.img": b"secret 2" * CHUNK, "empty.img": b""}


def contents(directory: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.mark.parametrize("mounted", [False, True])
def test_a_draft_is_published_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    draft, final = a_draft(tmp_path, monkeypatch, mounted)
    assert Path(draft.images).parent == tmp_path / "scratch"
    assert Path(draft.images).stat().st_mode & 0o777 == 0o700
    made = draft.publish(a_manifest())
    assert contents(draft.images) == PLAIN  # for the lane to fill in from
    assert not any(b"secret" in path.read_bytes() for path in final.rglob("*") if path.is_file())
    draft.discard()
    assert os.listdir(tmp_path / "scratch") == []
    assert os.listdir(final.parent) == ["checkpoint"]
    loaded = checkpoint_dir.load(str(final))
    assert loaded == made
    assert loaded.encryption["key"] == KEY.identity
    assert checkpoint_dir.verify(str(final), loaded) == []  # without a key
    assert {path.name for path in final.iterdir()} == {*PLAIN, "grit.json"}
    target = tmp_path / "clear"
    target.mkdir()
    sealed.open_all(str(final), str(target), list(PLAIN), KEY, loaded.encryption["id"])
    assert contents(target) == PLAIN


@pytest.mark.parametrize("mounted", [False, True])
def test_an_encrypted_one_is_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool
) -> None:
    draft, final = a_draft(tmp_path, monkeypatch, mounted)
    draft.publish(a_manifest())
    draft.withdraw()
    assert not (final / "grit.json").exists()
    assert contents(draft.images) == PLAIN  # still there for a refill
    draft.discard()
    assert list(tmp_path.rglob("*.img")) == []


def test_what_cannot_be_encrypted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, _ = a_draft(tmp_path, monkeypatch, mounted=False)
    Path(draft.images, "a-link").symlink_to("inventory.img")
    with pytest.raises(CheckpointDirError, match="is not a plain file"):
        draft.publish(a_manifest())
    assert not draft.published
    draft.discard()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_without_room_for_the_plain_files_nothing_begins(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDirError, match=r"/no/scratch \(scratch_dir, .*No such file"):
        Draft.begin(str(tmp_path / "checkpoint"), KEY, "/no/scratch")
    assert os.listdir(tmp_path) == []


def test_what_was_left_in_the_clear_goes_with_the_next(tmp_path: Path) -> None:
    """Whoever made it: its daemon was killed, so that it is not locked."""
    mine = Draft.plain(str(tmp_path))
    left = tmp_path / ".grit-partial-0123456789abcdef"
    left.mkdir()
    (left / "pages-1.img").write_text("secret")
    another = Draft.plain(str(tmp_path))
    there = {path.name for path in tmp_path.iterdir()}
    assert there == {os.path.basename(one.path) for one in (mine, another)}
