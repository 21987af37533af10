"""Encrypted files of a checkpoint: AES-256-GCM in chunks, in constant memory.

    file     MAGIC, 20 random bytes (the salt), chunks
    chunk    CHUNK bytes, the last one fewer or as many, and after each its tag of 16 bytes
    key      HMAC-SHA-256 of MAGIC and the salt, by the node's key: another for each file
    nonce    the chunk's number in 11 bytes, then 1 for the last chunk, else 0

Each chunk is bound to the file's name and to the checkpoint's id (associated data). So what is cut
short, moved within a file, renamed, or taken from another checkpoint does not decrypt. This is the
STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar: Online Authenticated-Encryption and its
Nonce-Reuse Misuse-Resistance, 2015).
"""

from __future__ import annotations

import errno
import os
from functools import partial

from shim import digests, offsets, signing
from shim.manifest import CheckpointDirError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from io import FileIO

    from shim.config import GritOptions

ALGORITHM = "AES-256-GCM in chunks of 1 MiB"
MAGIC = b"grit-sealed1"
CHUNK = 1 << 20  # bytes

_PART = 64
"""Chunks that a thread takes at a time; a file of many is encrypted by many."""

_SALT = 20  # bytes
_HEAD = len(MAGIC) + _SALT
_TAG = 16  # bytes
_KEY = 32  # bytes
_COMMAND_SECONDS = 30.0
_MOST_STDERR = 300  # characters of it in an error


class SealError(CheckpointDirError):
    """There is no key, it is the wrong one, or a file is not what was encrypted with it."""


class Key:
    """`identity` tells people which key it is, and no more of it."""

    __slots__ = ("identity", "secret", "source")

    def __init__(self, secret: bytes, source: str) -> None:
        import hmac

        self.secret, self.source = secret, source
        self.identity = hmac.digest(secret, b"identity of this key", "sha256").hex()[:16]

    def __repr__(self) -> str:
        return f"{self.source} ({self.identity})"


def key(settings: GritOptions) -> Key | None:
    """What the node encrypts with, from the file or the command that grit.toml names; None where it
    names neither. Raises SealError, SigningError."""
    path, argv = settings.encryption_key_file, settings.encryption_key_command
    if path and argv:
        raise SealError(
            "encryption_key_file and encryption_key_command are both set; there is one key: "
            "remove one"
        )
    if not path and not argv:
        return None
    _cipher()
    if argv:
        return Key(_secret(_output(argv), f"what {argv[0]} printed"), argv[0])
    assert path
    return _from_file(path)


def keys(settings: GritOptions) -> list[Key]:
    """All that the node decrypts with: its key, and those it had before. Raises SealError,
    SigningError."""
    mine = key(settings)
    return ([mine] if mine else []) + [_from_file(path) for path in settings.old_encryption_keys]


def key_for(settings: GritOptions, identity: str) -> Key:
    """The one that a checkpoint was encrypted with. Raises SealError, SigningError."""
    found = keys(settings)
    for one in found:
        if one.identity == identity:
            return one
    if not found:
        raise SealError(
            f"the key is {identity}, and grit.toml names none: set encryption_key_file or "
            "encryption_key_command"
        )
    here = ", ".join(map(repr, found))
    raise SealError(
        f"the key is {identity}, and those here are {here}: name it in old_encryption_keys"
    )


def _from_file(path: str) -> Key:
    data, mode = signing.read_key(path)
    if mode & 0o077:
        raise SealError(
            f"the key {path} may be read by others (mode {mode:04o}); chmod go= {path}, and take a "
            "new key if it was known"
        )
    return Key(_secret(data, f"the key {path}"), path)


def seal_all(source: str, target: str, names: Collection[str], by: Key, checkpoint: str) -> None:
    """Encrypts the files `names` of a directory into another, on all processors. `checkpoint` is
    its id, which they are bound to. Raises OSError."""
    jobs: list[Callable[[], None]] = []
    for name in names:
        paths = os.path.join(source, name), os.path.join(target, name)
        size, head = os.stat(paths[0]).st_size, MAGIC + os.urandom(_SALT)
        bound = _bound(name, checkpoint)
        last = max(-(-size // CHUNK) - 1, 0)
        jobs += [partial(_seal, *paths, n, last, size, head, by, bound) for n in _parts(last)]
    digests.in_threads(jobs)


def open_all(source: str, target: str, names: Collection[str], by: Key, checkpoint: str) -> None:
    """The reverse. Raises SealError with the name of a file that is not what was encrypted under
    that name, in that checkpoint, with that key; OSError. Then `target` is not to be used."""
    jobs: list[Callable[[], None]] = []
    for name in names:
        paths = os.path.join(source, name), os.path.join(target, name)
        size = os.stat(paths[0], follow_symlinks=False).st_size - _HEAD
        bound = _bound(name, checkpoint)
        last = max(-(-size // (CHUNK + _TAG)) - 1, 0)
        jobs += [partial(_open, *paths, n, last, size, name, by, bound) for n in _parts(last)]
    digests.in_threads(jobs)


def _seal(
    source: str, target: str, first: int, last: int, size: int, head: bytes, by: Key, bound: bytes
) -> None:
    """One part of a file: _PART chunks from the `first` on. `size` is that of all chunks."""
    cipher = _cipher()(_file_key(by, head))
    with _reading(source) as plain, _writing(target) as sealed:
        if first == 0:
            offsets.write(sealed.fileno(), head, 0)
        for number in range(first, min(first + _PART, last + 1)):
            chunk = _read(plain, min(CHUNK, size - number * CHUNK), number * CHUNK)
            data = cipher.encrypt(_nonce(number, last), chunk, bound)
            offsets.write(sealed.fileno(), data, _HEAD + number * (CHUNK + _TAG))


def _open(
    source: str, target: str, first: int, last: int, size: int, name: str, by: Key, bound: bytes
) -> None:
    """The reverse of `_seal`."""
    from cryptography.exceptions import InvalidTag

    with _reading(source) as sealed, _writing(target) as plain:
        head = os.pread(sealed.fileno(), _HEAD, 0)
        if len(head) != _HEAD or not head.startswith(MAGIC):
            raise SealError(f"{name}: is not encrypted, or its beginning is damaged")
        cipher = _cipher()(_file_key(by, head))
        for number in range(first, min(first + _PART, last + 1)):
            at = number * (CHUNK + _TAG)
            chunk = _read(sealed, min(CHUNK + _TAG, size - at), _HEAD + at)
            try:
                data = cipher.decrypt(_nonce(number, last), chunk, bound)
            except (InvalidTag, ValueError):
                raise SealError(
                    f"{name}: cannot be decrypted from byte {number * CHUNK} on with the key "
                    f"{by!r}: it is damaged, cut short, or was another file, or another "
                    "checkpoint's"
                ) from None
            offsets.write(plain.fileno(), data, number * CHUNK)


def _parts(last: int) -> range:
    """The numbers of the chunks that the parts of a file begin with."""
    return range(0, last + 1, _PART)


def _nonce(number: int, last: int) -> bytes:
    return number.to_bytes(11, "big") + (b"\1" if number == last else b"\0")


def _bound(name: str, checkpoint: str) -> bytes:
    return checkpoint.encode() + b"/" + os.fsencode(name)  # neither has a slash


def _file_key(by: Key, head: bytes) -> bytes:
    import hmac

    return hmac.digest(by.secret, head, "sha256")


def _reading(path: str) -> FileIO:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return open(path, "rb", buffering=0, opener=lambda path, _: os.open(path, flags))


def _writing(path: str) -> FileIO:
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return open(path, "wb", buffering=0, opener=lambda path, _: os.open(path, flags, 0o600))


def _read(file: FileIO, size: int, at: int) -> bytes:
    data = os.pread(file.fileno(), size, at)
    if len(data) != size:
        raise OSError(errno.EIO, "was cut short while it was read", file.name)
    return data


def _secret(data: bytes, what: str) -> bytes:
    if len(data) == _KEY:
        return data
    text = data.strip()
    if len(text) == 2 * _KEY and set(text) <= set(b"0123456789abcdefABCDEF"):
        return bytes.fromhex(text.decode())
    raise SealError(
        f"{what} is no key: it must be {_KEY} bytes, or {2 * _KEY} hexadecimal digits "
        f"(openssl rand -hex {_KEY}), and has {len(data)} bytes"
    )


def _output(argv: tuple[str, ...]) -> bytes:
    import subprocess

    told = f"encryption_key_command {argv[0]}"
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SealError(f"{told} did not end within {_COMMAND_SECONDS:g} s") from None
    except OSError as error:
        raise SealError(f"{told} cannot be run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-_MOST_STDERR:] or "it said nothing"
        how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
        raise SealError(f"{told} failed with {how}: {said}")
    return done.stdout


def _cipher() -> Callable[[bytes], AESGCM]:
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError:
        raise SealError(
            "encryption needs the Python package cryptography (python3-cryptography in Debian), "
            "which is not installed"
        ) from None
    return AESGCM


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
