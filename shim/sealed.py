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

import os

from shim import digests, signing
from shim.manifest import CheckpointDirError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator
    from io import BufferedIOBase

    from shim.config import GritOptions

ALGORITHM = "AES-256-GCM in chunks of 1 MiB"
MAGIC = b"grit-sealed1"
CHUNK = 1 << 20  # bytes

_SALT = 20  # bytes
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
    """The node's key, from the file or the command that grit.toml names; None where it names
    neither. Raises SealError, SigningError."""
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
    data, mode = signing.read_key(path)
    if mode & 0o077:
        raise SealError(
            f"the key {path} may be read by others (mode {mode:04o}); chmod go= {path}, and take a "
            "new key if it was known"
        )
    return Key(_secret(data, f"the key {path}"), path)


def seal_all(source: str, target: str, names: Collection[str], by: Key, checkpoint: str) -> None:
    """Encrypts the files `names` of a directory into new ones in another, several at a time.
    `checkpoint` is its id, which they are bound to. Raises OSError."""

    def one(name: str) -> None:
        with _reading(os.path.join(source, name)) as file:
            _write(os.path.join(target, name), _sealed(file, name, by, checkpoint))

    digests.in_threads([lambda n=name: one(n) for name in names])  # type: ignore[misc]


def open_all(source: str, target: str, names: Collection[str], by: Key, checkpoint: str) -> None:
    """The reverse. Raises SealError with the name of a file that is not what was encrypted under
    that name, in that checkpoint, with that key; OSError. Then `target` is not to be used."""

    def one(name: str) -> None:
        with _reading(os.path.join(source, name)) as file:
            _write(os.path.join(target, name), _opened(file, name, by, checkpoint))

    digests.in_threads([lambda n=name: one(n) for name in names])  # type: ignore[misc]


def _sealed(file: BufferedIOBase, name: str, by: Key, checkpoint: str) -> Iterator[bytes]:
    head = MAGIC + os.urandom(_SALT)
    yield head
    bound = _bound(name, checkpoint)
    cipher = _cipher()(_file_key(by, head))
    for nonce, chunk in _chunks(file, CHUNK):
        yield cipher.encrypt(nonce, chunk, bound)


def _opened(file: BufferedIOBase, name: str, by: Key, checkpoint: str) -> Iterator[bytes]:
    from cryptography.exceptions import InvalidTag

    head = file.read(len(MAGIC) + _SALT)
    if len(head) != len(MAGIC) + _SALT or not head.startswith(MAGIC):
        raise SealError(f"{name}: is not encrypted, or its beginning is damaged")
    bound = _bound(name, checkpoint)
    cipher = _cipher()(_file_key(by, head))
    at = 0
    for nonce, chunk in _chunks(file, CHUNK + _TAG):
        try:
            yield cipher.decrypt(nonce, chunk, bound)
        except (InvalidTag, ValueError):
            raise SealError(
                f"{name}: cannot be decrypted from byte {at} on with the key {by!r}: it is "
                "damaged, cut short, or was another file, or another checkpoint's"
            ) from None
        at += CHUNK


def _chunks(file: BufferedIOBase, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Nonce and content of each chunk; of an empty file an empty one."""
    chunk, number = file.read(size), 0
    while True:
        following = file.read(size)
        yield number.to_bytes(11, "big") + (b"\0" if following else b"\1"), chunk
        if not following:
            return
        chunk, number = following, number + 1


def _bound(name: str, checkpoint: str) -> bytes:
    return checkpoint.encode() + b"/" + os.fsencode(name)  # neither has a slash


def _file_key(by: Key, head: bytes) -> bytes:
    import hmac

    return hmac.digest(by.secret, head, "sha256")


def _reading(path: str) -> BufferedIOBase:
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _write(path: str, parts: Iterator[bytes]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[file.write(left) or 0 :]


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
