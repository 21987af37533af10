"""Signed checkpoints: what nobody vouches for is not restored, whatever its checksums say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shim import checkpoint_dir, manifest, signing
from shim.checkpoint_dir import CheckpointDirError, Draft
from shim.config import GritOptions
from shim.gritctl import node_checks
from shim.signing import SigningError
from tests.test_checkpoint_dir import a_manifest, dump_into
from tests.test_checkpoint_whole import _wrong

OPENSSL = ["openssl", "genpkey", "-algorithm", "ed25519", "-out"]


class Pair:
    """A key to sign with and the one to verify by, in files."""

    def __init__(self, directory: Path, kind: str, name: str) -> None:
        self.private = self.public = directory / f"{name}.key"
        if kind == "hmac":
            self.private.write_bytes(os.urandom(32))
        else:
            subprocess.run([*OPENSSL, self.private], check=True)
            self.public = directory / f"{name}.pub"
            words = ["openssl", "pkey", "-in", self.private, "-pubout", "-out", self.public]
            subprocess.run(words, check=True)
        self.private.chmod(0o600)


@pytest.fixture(params=["ed25519", "hmac"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pair(tmp_path: Path, kind: str) -> Pair:
    return Pair(tmp_path, kind, "ops")


def make(final: Path, key: Path | None, container: str = "") -> Path:
    """A checkpoint as gritctl lays it out; its image directory."""
    sign = signing.signer(str(key) if key else None)
    whole = Draft.begin(str(final))
    place = Path(whole.path, container)
    place.mkdir(exist_ok=True)
    images = Draft.begin(str(place / "checkpoint"))
    dump_into(images)
    images.publish(a_manifest(), sign=sign)
    (place / "rootfs-diff.tar").write_bytes(b"layer")
    (place / "spec.dump").write_text("{}")
    whole.publish_whole(sign)
    return final / container / "checkpoint"


def trusting(*keys: Path) -> GritOptions:
    return GritOptions(verify_keys=tuple(map(str, keys)))


@pytest.mark.parametrize("container", ["", "web"])
def test_signed_is_restored(tmp_path: Path, pair: Pair, container: str) -> None:
    images = make(tmp_path / "job", pair.private, container)
    assert _wrong(images, trusting(pair.public)) == ""
    assert _wrong(images) == ""  # where nobody asks, nobody is hindered
    where = images / "grit.json"
    told = signing.require(where.read_bytes(), str(where), [str(pair.public)])
    assert told.startswith(f"{pair.public} (")
    assert checkpoint_dir.verify_sums(str(tmp_path / "job"), [str(pair.public)]) == []


def test_unsigned_is_refused(tmp_path: Path, pair: Pair) -> None:
    images = make(tmp_path / "job", None)
    said = _wrong(images, trusting(pair.public))
    assert "is not signed, and verify_keys asks for a signature" in said
    (tmp_path / "job/SHA256SUMS").unlink()
    assert "grit.json: is not signed" in _wrong(images, trusting(pair.public))
    (images / "grit.json").unlink()
    assert "another tool wrote it" in _wrong(images, trusting(pair.public))


def test_anothers_key_is_refused_and_any_of_several_will_do(
    tmp_path: Path, pair: Pair, kind: str
) -> None:
    images = make(tmp_path / "job", pair.private)
    other = Pair(tmp_path, kind, "other")
    said = _wrong(images, trusting(other.public))
    assert "which is none of verify_keys" in said
    assert _wrong(images, trusting(other.public, pair.public)) == ""


def test_what_was_changed_and_sealed_again_is_refused(tmp_path: Path, pair: Pair) -> None:
    """The checksums of someone who can compute them are right; the signature is not."""
    images = make(tmp_path / "job", pair.private)
    pages = images / "pages-1.img"
    pages.write_bytes(pages.read_bytes()[:-1] + b"!")
    changed = checkpoint_dir.load(str(images))
    digest = checkpoint_dir.digests.take({"x": (str(pages), pages.stat().st_size)})["x"]
    assert isinstance(digest, str)
    changed.files["pages-1.img"] = manifest.File(pages.stat().st_size, digest)
    (images / "grit.json").write_bytes(changed.encode())
    sums = tmp_path / "job/SHA256SUMS"
    names = [line.split("  ")[1] for line in sums.read_text().splitlines()]
    done = subprocess.run(["sha256sum", *names], cwd=sums.parent, capture_output=True, check=True)
    sums.write_bytes(done.stdout)
    assert _wrong(images) == ""
    assert "SHA256SUMS: was changed after it was signed" in _wrong(images, trusting(pair.public))
    for path in (
        sums,
        Path(f"{sums}.sig"),
        tmp_path / "job/rootfs-diff.tar",
        tmp_path / "job/spec.dump",
    ):
        path.unlink()
    assert "grit.json: was changed after it was signed" in _wrong(images, trusting(pair.public))


def test_every_bit_of_a_signature_counts(tmp_path: Path, pair: Pair) -> None:
    images = make(tmp_path / "job", pair.private)
    path = images / "grit.json.sig"
    was = path.read_bytes()
    identity = was.split()[1]
    for at in range(len(was) - 1):
        path.write_bytes(was[:at] + bytes([was[at] ^ 1]) + was[at + 1 :])
        said = _wrong(images, trusting(pair.public))
        # Which key it was is only told.
        harmless = was.index(identity) <= at < was.index(identity) + len(identity)
        assert harmless or "grit.json" in said, at
    path.write_bytes(was[:20])
    assert "grit.json.sig: is no signature" in _wrong(images, trusting(pair.public))


@pytest.mark.parametrize("name", ["rootfs-diff.tar", "container.log", "spec.dump", "config.dump"])
def test_what_lies_beside_must_be_signed_too(tmp_path: Path, pair: Pair, name: str) -> None:
    """A diff or a specification put beside somebody's signed images."""
    images = make(tmp_path / "job", pair.private)
    for path in (tmp_path / "job").iterdir():
        if path.is_file():
            path.unlink()
    assert _wrong(images, trusting(pair.public)) == ""  # as `ctr task checkpoint` leaves it
    (tmp_path / "job" / name).write_text("x")
    assert f"{name}: is not signed: there is no SHA256SUMS" in _wrong(images, trusting(pair.public))
    assert _wrong(images) == ""


def test_parts_of_two_signed_checkpoints_are_not_one(tmp_path: Path, pair: Pair) -> None:
    images = make(tmp_path / "job", pair.private)
    other = make(tmp_path / "other", pair.private)
    path = other / "grit.json"
    text = path.read_bytes().replace(b'"c1"', b'"c2"')
    above = text[: text.rindex(b',\n  "sha256_of_the_above')]
    path.write_bytes(above + manifest._SEAL_BEGINS + manifest._seal_of(above))
    sign = signing.signer(str(pair.private))
    assert sign
    Path(f"{path}.sig").write_bytes(sign(path.read_bytes()))
    for name in ("grit.json", "grit.json.sig"):
        (images / name).write_bytes((other / name).read_bytes())
    said = _wrong(images, trusting(pair.public))
    assert "checkpoint/grit.json: has SHA-256 " in said


def test_an_image_that_nobody_signed_is_refused(tmp_path: Path, pair: Pair) -> None:
    """CRIU looks for some images by name, and a pod's volume is unpacked if it is there."""
    images = make(tmp_path / "job", pair.private)
    (images / "volume-%2Fdev%2Fshm.tar").write_bytes(b"x")
    assert _wrong(images) == ""
    assert "volume-%2Fdev%2Fshm.tar: is not in the manifest" in _wrong(
        images, trusting(pair.public)
    )


def test_openssl_agrees(tmp_path: Path) -> None:
    """The commands in docs/security.md."""
    pair = Pair(tmp_path, "ed25519", "ops")
    images = make(tmp_path / "job", pair.private)
    subprocess.run(
        "cut -d' ' -f3 grit.json.sig | base64 -d > ../sig && "
        f"openssl pkeyutl -verify -pubin -inkey {pair.public} -rawin -in grit.json -sigfile ../sig",
        shell=True,
        cwd=images,
        check=True,
    )


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (b"short", 0o600, "neither PEM nor a secret of 32 bytes"),
        (b"x" * 32, 0o640, r"may be read by others \(mode 0640\); chmod go= "),
        (b"x" * 100_000, 0o600, "larger than 65536 bytes"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n", 0o600, "is not an Ed25519 key in PEM"),
        (b"-----BEGIN PUBLIC KEY-----\nAAAA\n", 0o666, "may be written by others"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n", 0o644, "may be read by others"),
        (None, 0, "cannot be read: No such file or directory"),
    ],
)
def test_keys_that_are_none(tmp_path: Path, content: bytes | None, mode: int, reason: str) -> None:
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(SigningError, match=reason):
        signing.signer(str(path))


def test_other_kinds_of_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    words = ["openssl", "genpkey", "-algorithm", "X25519", "-out", path]
    subprocess.run(words, check=True)
    path.chmod(0o600)
    with pytest.raises(SigningError, match="not Ed25519"):
        signing.signer(str(path))
    pair = Pair(tmp_path, "ed25519", "ops")
    with pytest.raises(SigningError, match="is a public key, which cannot sign"):
        signing.signer(str(pair.public))
    os.chown(pair.private, 4711, 0)
    with pytest.raises(SigningError, match="belongs to the user 4711"):
        signing.signer(str(pair.private))


def test_a_draft_that_has_a_signature_is_none_of_ours(tmp_path: Path) -> None:
    draft = Draft.begin(str(tmp_path / "checkpoint"))
    dump_into(draft)
    Path(draft.path, "grit.json.sig").write_text("")
    with pytest.raises(CheckpointDirError, match=r"has a grit.json.sig already"):
        draft.publish(a_manifest())
    draft.discard()


def test_within_a_mount_point_the_signature_comes_before_the_manifest(
    tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "checkpoint"
    final.mkdir()
    monkeypatch.setattr(checkpoint_dir, "_is_mount_point", lambda path: True)
    draft = Draft.begin(str(final))
    dump_into(draft)
    draft.publish(a_manifest(), sign=signing.signer(str(pair.private)))
    assert draft._moved.index("grit.json.sig") < draft._moved.index("grit.json")
    checkpoint_dir.load(str(final), [str(pair.public)])
    draft.withdraw()
    assert list(final.iterdir()) == []


def test_cryptography_is_not_loaded_without_a_key_that_needs_it(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"s" * 32)
    key.chmod(0o600)
    code = (
        "import json, sys; from shim import checkpoint, restore, signing; "
        f"signing.signer(None); signing.signer({str(key)!r})(b'x'); "
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(signing.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not [name for name in json.loads(done.stdout) if name.startswith("cryptography")]


def test_the_doctor_names_keys_that_are_none(tmp_path: Path, pair: Pair) -> None:
    (tmp_path / "bad").write_text("")
    (tmp_path / "bad").chmod(0o600)
    options = GritOptions(
        sign_key=str(tmp_path / "bad"),
        verify_keys=(str(pair.public), str(tmp_path / "none")),
        checkpoint_roots=(str(tmp_path), "/nowhere"),
    )
    found = [(line.check, line.status) for line in node_checks.trust(options)]
    assert found == [
        ("sign_key", "fail"),
        ("verify_keys", "pass"),
        ("verify_keys", "fail"),
        ("checkpoint_roots", "warn"),
    ]
