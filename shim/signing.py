"""Who vouches for a checkpoint: signatures over the bytes of `grit.json` and of `SHA256SUMS`.

These name every file with its digest, so whoever signs them signs all. A key is a file: PEM with an
Ed25519 key, as `openssl genpkey -algorithm ed25519` makes it, or anything else, which is a secret
that all nodes share (HMAC-SHA-256). A signature is one line: algorithm, the key's identity, base64.
The identity only tells people which key it was; whether a signature holds is computed.
"""

from __future__ import annotations

import os

from shim.manifest import CheckpointDirError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Sign = Callable[[bytes], bytes]

ED25519 = "ed25519"
HMAC = "hmac-sha256"
SUFFIX = ".sig"

_PEM = b"-----BEGIN "
_PRIVATE = b"PRIVATE KEY-----"
_LEAST_SECRET = 32  # bytes; as long as the hash, RFC 2104, section 3
_MAX_KEY = 64 << 10  # bytes
_MAX_SIGNATURE = 4096  # bytes


class SigningError(CheckpointDirError):
    """A key cannot be used, or a checkpoint is not signed by any of the keys that are trusted."""


class _Key:
    """`sign` is None for the public half of a key; `holds` says whether a signature is its own."""

    __slots__ = ("algorithm", "holds", "identity", "path", "sign")

    def __init__(
        self,
        path: str,
        algorithm: str,
        identity: str,
        sign: Sign | None,
        holds: Callable[[bytes, bytes], bool],
    ) -> None:
        self.path, self.algorithm, self.identity = path, algorithm, identity
        self.sign, self.holds = sign, holds

    @property
    def described(self) -> str:
        return f"{self.path} ({self.algorithm} {self.identity})"


def signer(path: str | None) -> Sign | None:
    """What makes the content of a signature's file out of the bytes to sign, with the key in the
    file `path` (`sign_key`); None without a key. Raises SigningError."""
    import base64

    if path is None:
        return None
    key = _load(path)
    sign = key.sign
    if sign is None:
        raise SigningError(
            f"{path} is a public key, which cannot sign; sign_key is the private one"
        )
    return lambda data: (
        f"{key.algorithm} {key.identity} {base64.b64encode(sign(data)).decode()}\n".encode()
    )


def require(data: bytes, where: str, keys: Sequence[str]) -> str:
    """That one of the key files `keys` (`verify_keys`) has signed `data`, read from the file
    `where`, beside which the signature lies; returns that key's description. Raises SigningError.
    """
    algorithm, identity, signature = _read_signature(where)
    loaded = [_load(path) for path in keys]
    for key in loaded:
        if key.algorithm == algorithm and key.holds(signature, data):
            return key.described
    if any((key.algorithm, key.identity) == (algorithm, identity) for key in loaded):
        raise SigningError(
            f"{where}: was changed after it was signed, or its signature was: the {algorithm} key "
            f"{identity} did not sign these bytes"
        )
    raise SigningError(
        f"{where}: is signed with the {algorithm} key {identity}, which is none of verify_keys"
    )


def described(path: str) -> str:
    """The key in a file, as `require` names it. Raises SigningError."""
    return _load(path).described


def claimed(where: str) -> str:
    """Which key the file `where` says it is signed with, unchecked; "" if there is no signature."""
    if not os.path.lexists(where + SUFFIX):
        return ""
    algorithm, identity, _ = _read_signature(where)
    return f"{algorithm} {identity}"


def _read_signature(where: str) -> tuple[str, str, bytes]:
    import base64

    path = where + SUFFIX
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            text = file.read(_MAX_SIGNATURE)
        algorithm, identity, encoded = text.decode("ascii").split()
        signature = base64.b64decode(encoded, validate=True)
        if base64.b64encode(signature).decode() != encoded:  # bits beyond the last byte
            raise ValueError(encoded)
        return algorithm, identity, signature
    except FileNotFoundError:
        raise SigningError(
            f"{where}: is not signed, and verify_keys asks for a signature ({path})"
        ) from None
    except OSError as error:
        raise SigningError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # also UnicodeDecodeError and binascii's
        raise SigningError(f"{path}: is no signature") from error


def _load(path: str) -> _Key:
    data, mode = read_key(path)
    if data.startswith(_PEM):
        secret = _PRIVATE in data.partition(b"\n")[0]
    else:
        secret = True
        if len(data) < _LEAST_SECRET:
            raise SigningError(
                f"the key {path} is neither PEM nor a secret of {_LEAST_SECRET} bytes or more"
            )
    if mode & (0o077 if secret else 0o022):
        raise SigningError(
            f"the key {path} may be {'read' if secret else 'written'} by others (mode {mode:04o}); "
            f"chmod {'go=' if secret else 'go-w'} {path}, and take a new key if it was known"
        )
    return _pem(path, data, secret) if data.startswith(_PEM) else _shared(path, data)


def read_key(path: str) -> tuple[bytes, int]:
    """The file's bytes and mode. Its owner must be root or us."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            data = file.read(_MAX_KEY + 1)
    except OSError as error:
        raise SigningError(f"the key {path} cannot be read: {error.strerror}") from error
    if len(data) > _MAX_KEY:
        raise SigningError(f"the key {path} is larger than {_MAX_KEY} bytes; it is no key")
    if found.st_uid not in (0, os.geteuid()):
        raise SigningError(f"the key {path} belongs to the user {found.st_uid}; it must be root's")
    return data, found.st_mode & 0o7777


def _shared(path: str, secret: bytes) -> _Key:
    import hmac

    def sign(data: bytes) -> bytes:
        return hmac.digest(secret, data, "sha256")

    def holds(signature: bytes, data: bytes) -> bool:
        return hmac.compare_digest(signature, sign(data))

    return _Key(path, HMAC, sign(b"identity of this key").hex()[:16], sign, holds)


def _pem(path: str, data: bytes, secret: bool) -> _Key:
    import hashlib

    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import (
            Ed25519PrivateKey,
            Ed25519PublicKey,
        )
    except ImportError:
        raise SigningError(
            f"the key {path} needs the Python package cryptography (python3-cryptography in "
            "Debian), which is not installed; a shared secret needs none"
        ) from None
    sign: Sign | None = None
    try:
        if secret:
            private = serialization.load_pem_private_key(data, password=None)
            if not isinstance(private, Ed25519PrivateKey):
                raise ValueError("not Ed25519")
            sign, public = private.sign, private.public_key()
        else:
            loaded = serialization.load_pem_public_key(data)
            if not isinstance(loaded, Ed25519PublicKey):
                raise ValueError("not Ed25519")
            public = loaded
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # TypeError: with a password
        raise SigningError(
            f"the key {path} is not an Ed25519 key in PEM without a password: {error}"
        ) from error

    def holds(signature: bytes, signed: bytes) -> bool:
        try:
            public.verify(signature, signed)
        except InvalidSignature:
            return False
        return True

    raw = public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _Key(path, ED25519, hashlib.sha256(raw).hexdigest()[:16], sign, holds)
