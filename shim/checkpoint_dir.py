"""The checkpoint's layout on disk: the one module that knows it.

A checkpoint is a directory as GRIT and checkpointctl lay it out: `checkpoint/`, flat, with CRIU's
images, our device-memory files and our manifest `grit.json`, and beside it `rootfs-diff.tar`,
`container.log`, `config.dump` and `spec.dump`, which clients write. A dump goes into a draft under
another name; publishing checks it, takes the size and digest of every file, brings everything to
the disk and renames. So a directory under its final name is a whole checkpoint, and this module
must never let a partial one be taken for it, nor remove anything but drafts of its own.
"""

from __future__ import annotations

import os

from shim import digests
from shim.manifest import (
    INVENTORY,
    MANIFEST,
    CheckpointDirError,
    File,
    Manifest,
    ManifestError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from shim.sealed import Key
    from shim.signing import Sign

    _Known = Mapping[str, Mapping[tuple[str, int], bytes]]

__all__ = [
    "CONFIG_DUMP",
    "CONTAINER_LOG",
    "IMAGES",
    "ROOTFS_DIFF",
    "SPEC_DUMP",
    "SUMS",
    "CheckpointDirError",
    "Draft",
    "ForeignCheckpoint",
    "ManifestError",
    "Problem",
    "abandoned",
    "beside",
    "container_log",
    "find_checkpoint",
    "image_directories",
    "is_downloaded",
    "load",
    "reason",
    "remove",
    "remove_abandoned",
    "rootfs_diff",
    "verify",
    "verify_beside",
    "verify_sums",
]

IMAGES = "checkpoint"
ROOTFS_DIFF = "rootfs-diff.tar"
CONTAINER_LOG = "container.log"
CONFIG_DUMP = "config.dump"
SPEC_DUMP = "spec.dump"
SUMS = "SHA256SUMS"  # of all the manifest does not speak of, and of the manifest; for sha256sum -c
SIGNATURE = ".sig"  # shim.signing.SUFFIX; after the name of what is signed, the manifest or SUMS
DOWNLOADED = "download-state"
MAX_MANIFEST = 16 << 20  # bytes; far above thousands of files and processes

# What other tools put beside `checkpoint/`, and `remove` takes for a part of the checkpoint.
_BESIDE = {ROOTFS_DIFF, CONTAINER_LOG, CONFIG_DUMP, SPEC_DUMP, SUMS, DOWNLOADED} | {
    SUMS + SIGNATURE,
    "artifacts",
    "bind.mounts",
    "deleted.files",
    "devshm-checkpoint.tar",
    "dump.log",
    "io.kubernetes.cri-o.LogPath",
    "network.status",
    "stats-dump",
    "status",
    "status.dump",
    "volumes",
}
_PARTIAL = ".grit-partial-"
_SHOWN = {digests.SHA256: "SHA-256", digests.XXH3: "XXH3"}
_RANDOM_BYTES = 8


class ForeignCheckpoint(ManifestError):
    """CRIU images without a manifest: written by another tool, restorable but not verifiable."""


class Draft:
    """A checkpoint being written: CRIU dumps into `path`, and publish() makes it `final`.

    The directory is kept locked (flock) while its owner lives, in whatever pid namespace and
    across a reboot, so a draft whose lock is free is one that a crash left behind.
    """

    def __init__(self, final: str, path: str, lock: int, *, inside: bool) -> None:
        import threading

        self.final = final
        self.path = path
        self._lock: int | None = lock
        self._inside = inside
        self._moved: list[str] = []
        self._begun_at = path
        self._plain: Draft | None = None
        self.key: Key | None = None
        self.published = False
        self._given_up = False
        self._verdict = threading.Lock()
        """Guards `published` and `_given_up`, of which one comes first."""
        self._busy = threading.Lock()
        """Held by publish() and discard(): a disk that hung may leave both to be done at a time."""

    @classmethod
    def begin(cls, final: str, key: Key | None = None, plain_in: str = "") -> Draft:
        """A draft for the image directory `final`, which must be empty or not be there.

        It is made beside `final`, on the same file system. Where that cannot be (`final` is a
        mount point, or its parent is not to be written to) it is made within. With a `key`, what
        is published is encrypted, and CRIU dumps into another directory, made in `plain_in`.
        Raises CheckpointDirError, with nothing changed.
        """
        draft = cls._begin(final)
        if key is not None:
            try:
                draft._plain, draft.key = cls.plain(plain_in), key
            except BaseException:
                draft.discard()
                raise
        return draft

    @classmethod
    def plain(cls, directory: str) -> Draft:
        """A draft that nothing is published of, in `directory`: for the files of an encrypted
        checkpoint, in the clear. Raises CheckpointDirError."""
        remove_abandoned(directory, "")
        try:
            return cls._make("", directory, "", inside=False)
        except OSError as error:
            raise CheckpointDirError(
                f"cannot make a directory in {directory} (scratch_dir, for the images of encrypted "
                f"checkpoints in the clear): {error.strerror}"
            ) from error

    @property
    def images(self) -> str:
        """The directory with what CRIU has written, as it wrote it."""
        if self._plain is not None:
            return self._plain.path
        return self.final if self.published else self.path

    @property
    def takes_room_in(self) -> dict[str, str]:
        """The directories that each take all images, and what helps where one is too small."""
        more = {} if self._plain is None else {self._plain.path: "set scratch_dir to another"}
        return {**more, self.path: "name another"}

    @classmethod
    def _begin(cls, final: str) -> Draft:
        final = os.path.realpath(final)
        parent, base = os.path.split(final)
        if not os.path.isdir(parent):
            raise CheckpointDirError(
                f"cannot write a checkpoint to {final}: there is no directory {parent}; create it "
                "or name another place"
            )
        exists = os.path.lexists(final)
        if exists:
            remove_abandoned(final, "")
            _must_be_empty(final)
        remove_abandoned(parent, base)
        where = parent
        try:
            if not (exists and _is_mount_point(final)):
                try:
                    return cls._make(final, parent, base, inside=False)
                except OSError:
                    if not exists:
                        raise
            where = final
            return cls._make(final, final, "", inside=True)
        except OSError as error:
            raise CheckpointDirError(
                f"cannot write a checkpoint to {final}: cannot make a directory in {where}: "
                f"{error.strerror}"
            ) from error

    @classmethod
    def _make(cls, final: str, directory: str, base: str, *, inside: bool) -> Draft:
        prefix = os.path.join(directory, _partial_prefix(base))
        while True:
            path = prefix + os.urandom(_RANDOM_BYTES).hex()
            os.mkdir(path, 0o700)
            lock = _open_and_lock(path)
            if lock is not None:
                return cls(final, path, lock, inside=inside)
            # Another draft's begin() came between and is taking ours for an abandoned one.

    def publish(
        self,
        manifest: Manifest,
        known: Mapping[tuple[str, int], bytes] | None = None,
        whole: Mapping[str, str] | None = None,
        *,
        algorithm: str = digests.SHA256,
        sign: Sign | None = None,
    ) -> Manifest:
        """Makes the draft the checkpoint, and returns the manifest as written.

        All files are read once for their checksums, several at a time, and synced; the manifest
        comes last, and then the rename. `known` are digests of blocks that were taken before (see
        `digests.take`), `whole` those of files that are synced, too, both by the same `algorithm`.
        `sign` signs the manifest, whose digests must then be ones that nobody can find a second
        file for. Of files that are encrypted here nothing is known before. Raises
        CheckpointDirError, after which `final` holds no checkpoint and discard() removes what there
        is.
        """
        with self._busy:
            return self._publish(manifest, known, whole, algorithm, sign)

    def _publish(
        self,
        manifest: Manifest,
        known: Mapping[tuple[str, int], bytes] | None,
        whole: Mapping[str, str] | None,
        algorithm: str,
        sign: Sign | None,
    ) -> Manifest:
        import time

        self._require_draft()
        try:
            names = self._checked_names()
            if self.key is not None:
                manifest, known, whole = self._encrypted(manifest, names, self.key), None, None
            begun = time.monotonic()
            done = whole or {}
            names_left = [name for name in names if name not in done]
            files = self._seal(names_left, algorithm=algorithm, known=known)
            for name, digest in done.items():
                files[name] = File(_sized(os.path.join(self.path, name))[1], digest, algorithm)
            made = Manifest(
                **{
                    **vars(manifest),
                    "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "phases": {**manifest.phases, "checksums": time.monotonic() - begun},
                    "files": files,
                }
            )
            encoded = made.encode()
            if sign is not None:
                _write_new(os.path.join(self.path, MANIFEST + SIGNATURE), sign(encoded))
                names.append(MANIFEST + SIGNATURE)
            _write_new(os.path.join(self.path, MANIFEST), encoded)
            _sync_directory(self.path)
            self._require_wanted()
            if self._inside:
                _must_be_empty(self.final, but=os.path.basename(self.path))
                self._move_up(names)
            else:
                self._take_name()
            with self._verdict:
                self.published = not self._given_up
            if not self.published:
                self._take_back()
                self._require_wanted()
        except OSError as error:
            raise CheckpointDirError(
                f"cannot publish the checkpoint {self.final}: {reason(error)}"
            ) from error
        self._unlock()
        return made

    def _encrypted(self, manifest: Manifest, names: list[str], key: Key) -> Manifest:
        """Encrypts the files into `path`, and tells of it in the manifest that is returned."""
        import time

        from shim import sealed

        begun = time.monotonic()
        kind = {"algorithm": sealed.ALGORITHM, "key": key.identity, "id": os.urandom(16).hex()}
        sealed.seal_all(self.images, self.path, names, key, kind["id"])
        phases = {**manifest.phases, "encrypt": round(time.monotonic() - begun, 6)}
        return Manifest(**{**vars(manifest), "encryption": kind, "phases": phases})

    def give_up(self) -> None:
        """Nobody waits for the publish() under way any longer: it raises CheckpointDirError, with
        the draft a draft still, whenever it comes to its end. Where it has just done so, see
        `published`. Waits for nothing."""
        with self._verdict:
            self._given_up = not self.published

    def withdraw(self) -> None:
        """Takes back what publish() made, for a dump that failed after all; does nothing if it made
        nothing. Raises CheckpointDirError, and then the checkpoint may still be there, whole."""
        if not self.published:
            return
        try:
            if self._inside:
                for name in reversed(self._moved):
                    os.unlink(os.path.join(self.final, name))
            else:
                os.rename(self.final, self._begun_at)
                _remove_tree(self._begun_at)
        except OSError as error:
            raise CheckpointDirError(
                f"cannot remove the checkpoint {self.final}: {reason(error)}; remove it by hand"
            ) from error
        self.published = False

    def publish_whole(self, sign: Sign | None = None) -> None:
        """Makes a draft that holds the layout around an image directory (or those of a pod's
        containers) the directory `final`: with the checksums of what the manifests inside do not
        speak of in SHA256SUMS, which `sign` signs, and everything on the disk. Raises
        CheckpointDirError as publish().
        """
        self._require_draft()
        try:
            names = sorted(_beside(self.path))
            sums = self._seal(names, plain=True)
            lines = "".join(f"{sums[name].digest}  {name}\n" for name in names)
            encoded = lines.encode("utf-8", "surrogateescape")
            _write_new(os.path.join(self.path, SUMS), encoded)
            if sign is not None:
                _write_new(os.path.join(self.path, SUMS + SIGNATURE), sign(encoded))
            for name in {os.path.dirname(name) for name in names} | {""}:
                os.chmod(os.path.join(self.path, name), 0o700)
                _sync_directory(os.path.join(self.path, name))
            if self._inside:
                _must_be_empty(self.final, but=os.path.basename(self.path))
                for name in sorted(os.listdir(self.path), key=lambda name: name == IMAGES):
                    os.rename(os.path.join(self.path, name), os.path.join(self.final, name))
                    self._moved.append(name)
                os.rmdir(self.path)
                _sync_directory(self.final)
            else:
                self._take_name()
        except OSError as error:
            raise CheckpointDirError(
                f"cannot publish the checkpoint {self.final}: {reason(error)}"
            ) from error
        self._unlock()

    def publish_copy(self, known: _Known | None = None) -> None:
        """Makes a draft that holds a copy of one container's checkpoint, from another node, the
        directory `final`: if every file is as the manifest and SHA256SUMS say, there is no other,
        and all is on the disk. `known` are digests that were taken of it before, as in verify().
        Raises CheckpointDirError as publish().
        """
        self._require_draft()
        images = os.path.join(self.path, IMAGES)
        problems: list[Problem] = []

        def check() -> None:
            problems.extend(verify(images, load(images), known=known))
            sums = verify_sums(self.path)
            problems.extend([Problem(SUMS, "missing", "is missing")] if sums is None else sums)

        def sync() -> None:
            for base, _, names in os.walk(self.path):
                for name in names:
                    with open(os.path.join(base, name), "rb", buffering=0) as file:
                        os.fsync(file.fileno())
                _sync_directory(base)

        try:
            digests.in_threads([sync, check], 2)
            if problems:
                raise CheckpointDirError(
                    f"what came for {self.final} is damaged: {listed(problems)}"
                )
            self._take_name()
        except OSError as error:
            raise CheckpointDirError(
                f"cannot publish the checkpoint {self.final}: {reason(error)}"
            ) from error
        self._unlock()
        self.published = True

    def discard(self) -> None:
        """Removes the draft and all in it; does nothing once discarded, or published, but for what
        was encrypted: that goes in any case, and first. Raises CheckpointDirError."""
        try:
            if self._plain is not None:
                self._plain.discard()
        finally:
            with self._busy:
                self._discard()

    def _discard(self) -> None:
        if self._lock is None:
            return
        try:
            for name in reversed(self._moved):  # the manifest first: it is what makes it whole
                moved = os.path.join(self.final, name)
                if os.path.isdir(moved) and not os.path.islink(moved):
                    _remove_tree(moved)
                else:
                    os.unlink(moved)
            self._moved.clear()
            if os.path.lexists(self.path):
                _remove_tree(self.path)
        except OSError as error:
            what = "unfinished checkpoint" if self.final else "images in the clear,"
            raise CheckpointDirError(
                f"cannot remove the {what} {self.path}: {reason(error)}; remove it by hand"
            ) from error
        finally:
            self._unlock()

    def _require_draft(self) -> None:
        if self._lock is None:
            raise CheckpointDirError(f"the draft for {self.final} was published or discarded")

    def _take_name(self) -> None:
        """All of it at once. Raises OSError."""
        os.rename(self.path, self.final)
        self.path = self.final
        _sync_directory(os.path.dirname(self.final))

    def _take_back(self) -> None:
        """All as it was before publish() gave it the final name. Raises OSError."""
        if self._inside:
            os.mkdir(self.path, 0o700)
            while self._moved:  # the manifest first
                name = self._moved[-1]
                os.rename(os.path.join(self.final, name), os.path.join(self.path, name))
                self._moved.pop()
        else:
            os.rename(self.final, self._begun_at)
            self.path = self._begun_at

    def _require_wanted(self) -> None:
        if self._given_up:
            raise CheckpointDirError(f"the draft for {self.final} was given up")

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _checked_names(self) -> list[str]:
        names = []
        with os.scandir(self.images) as entries:
            for entry in entries:
                if not entry.is_file(follow_symlinks=False):
                    # containerd's CRI packs the directory flat, and fails on anything else.
                    raise CheckpointDirError(
                        f"{entry.path} is not a plain file; a checkpoint holds nothing else"
                    )
                names.append(entry.name)
        if INVENTORY not in names:
            raise CheckpointDirError(
                f"{self.images} has no {INVENTORY}: CRIU did not finish its dump"
            )
        for ours in (MANIFEST, MANIFEST + SIGNATURE):
            if ours in names:
                raise CheckpointDirError(
                    f"{self.images} has a {ours} already; grit writes that name"
                )
        return sorted(names)

    def _seal(
        self,
        names: list[str],
        *,
        algorithm: str = digests.SHA256,
        plain: bool = False,
        known: Mapping[tuple[str, int], bytes] | None = None,
    ) -> dict[str, File]:
        """Mode, sync, size and digest of every file, at the same time."""
        paths = {name: _sized(os.path.join(self.path, name)) for name in names}

        def sync() -> None:
            for path, _ in paths.values():
                with open(path, "rb", buffering=0) as file:
                    if os.fstat(file.fileno()).st_mode & 0o777 != 0o600:
                        os.fchmod(file.fileno(), 0o600)
                    os.fsync(file.fileno())

        sealed = {}
        taken = digests.take(paths, algorithm=algorithm, plain=plain, also=[sync], known=known)
        for name, found in taken.items():
            if isinstance(found, OSError):
                raise found
            sealed[name] = File(paths[name][1], found, algorithm)
        return sealed

    def _move_up(self, names: list[str]) -> None:
        """Publishing within `final`: what marks a checkpoint goes last, its manifest at the end."""
        for name in [n for n in names if n != INVENTORY] + [INVENTORY, MANIFEST]:
            os.rename(os.path.join(self.path, name), os.path.join(self.final, name))
            self._moved.append(name)
        os.rmdir(self.path)
        os.chmod(self.final, 0o700)
        _sync_directory(self.final)


class Problem:
    """Something wrong with one file; `kind` is missing, extra, not-a-file, size, checksum, owner or
    mode (`confined` has those two)."""

    __slots__ = ("kind", "name", "text")

    def __init__(self, name: str, kind: str, text: str) -> None:
        self.name, self.kind, self.text = name, kind, text

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"

    __repr__ = __str__


def load(directory: str, keys: Sequence[str] = ()) -> Manifest:
    """The manifest of an image directory, signed by one of the `keys` (files) if there are any.

    Raises ForeignCheckpoint where CRIU images stand without one, SigningError where nobody vouches
    for it, and ManifestError for anything else that is wrong with it.
    """
    where = os.path.join(directory, MANIFEST)
    try:
        fd = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise _no_manifest(directory) from None
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read: {error.strerror}") from error
    try:
        with open(fd, "rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise ManifestError(f"{where}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_MANIFEST:
        raise ManifestError(f"{where}: is larger than {MAX_MANIFEST} bytes; it is no manifest")
    if not keys:
        return Manifest.decode(data, where)
    from shim import signing

    signing.require(data, where, keys)
    manifest = Manifest.decode(data, where)
    if any(file.algorithm != digests.SHA256 for file in manifest.files.values()):
        raise signing.SigningError(
            f"{where}: is signed, but its files' digests are XXH3's, which do not tell a forged "
            "file from the right one; who signs has to take SHA-256"
        )
    return manifest


def verify(
    directory: str,
    manifest: Manifest,
    *,
    contents: bool = True,
    but: Collection[str] = (),
    known: _Known | None = None,
) -> list[Problem]:
    """What differs between the directory and its manifest; an empty list if nothing does.

    Sizes are always compared, checksums only with `contents`, which reads every byte, except of
    those that the caller reads himself (`but`), and of blocks whose digests are `known`, by
    algorithm.
    Raises CheckpointDirError if the directory cannot be read.
    """
    problems = []
    intact = []
    try:
        with os.scandir(directory) as entries:
            present = {entry.name: entry for entry in entries}
        for name, expected in manifest.files.items():
            entry = present.get(name)
            if entry is None:
                problems.append(Problem(name, "missing", "is missing"))
            elif not entry.is_file(follow_symlinks=False):
                problems.append(Problem(name, "not-a-file", "is not a plain file"))
            elif (size := entry.stat(follow_symlinks=False).st_size) != expected.size:
                text = f"has {size} bytes; the manifest says {expected.size}"
                problems.append(Problem(name, "size", text))
            else:
                intact.append(name)
        for name in present:
            ours = name in (MANIFEST, MANIFEST + SIGNATURE) or _is_partial(name, "")
            if name not in manifest.files and not ours:
                problems.append(Problem(name, "extra", "is not in the manifest"))
    except OSError as error:
        raise CheckpointDirError(f"cannot read {directory}: {reason(error)}") from error

    if contents:
        intact = [name for name in intact if name not in but]
        for algorithm in {manifest.files[name].algorithm for name in intact}:
            files = {n: f for n in intact if (f := manifest.files[n]).algorithm == algorithm}
            problems += _compare(directory, files, algorithm, (known or {}).get(algorithm))
    return sorted(problems, key=lambda problem: problem.name)


def _compare(
    directory: str,
    files: dict[str, File],
    algorithm: str,
    known: Mapping[tuple[str, int], bytes] | None,
) -> list[Problem]:
    """What differs between files and their digests, all of that algorithm."""
    paths = {name: (os.path.join(directory, name), file.size) for name, file in files.items()}
    problems = []
    try:
        for name, found in digests.take(paths, algorithm=algorithm, known=known).items():
            right = files[name].digest
            if isinstance(found, OSError):
                problems.append(_unreadable(name, found))
            elif found != right:
                text = f"has {_SHOWN[algorithm]} {found}; the manifest says {right}"
                problems.append(Problem(name, "checksum", text))
    except digests.Unavailable as error:
        text = f"has checksums of {len(files)} files that cannot be checked: {error}"
        problems.append(Problem(MANIFEST, "checksum", text))
    return problems


def find_checkpoint(directory: str, container_name: str | None) -> str | None:
    """The image directory meant by the annotation `grit.dev/checkpoint=<directory>`.

    That is `<directory>/<container_name>/checkpoint` (GRIT: one of a pod's containers),
    `<directory>/checkpoint`, or the directory itself where it holds CRIU's images. None if there
    is none of them. Raises CheckpointDirError where one is there but not whole: that is no reason
    to start the container from its beginning.
    """
    if container_name and (container_name in (".", "..") or "/" in container_name):
        raise CheckpointDirError(f"{container_name!r} is not a container's name")
    places = [os.path.join(directory, container_name, IMAGES)] if container_name else []
    places.append(os.path.join(directory, IMAGES))
    for place in places:
        if os.path.isfile(os.path.join(place, INVENTORY)):
            return place
    if os.path.isfile(os.path.join(directory, INVENTORY)):
        return directory
    for place in places:
        # A pod's container may itself be named "checkpoint": its directory is no image directory.
        if os.path.isdir(place) and not os.path.isdir(os.path.join(place, IMAGES)):
            raise CheckpointDirError(
                f"{place} is not a whole checkpoint: it has no {INVENTORY}. Copy it again, or "
                "remove it to start the container from its beginning"
            )
    return None


def image_directories(directory: str) -> list[tuple[str, str]]:
    """The image directories of the checkpoint `directory`, as (container's name, path): one with
    the name "" where it is a single container's, one for each container of a pod. Empty if there
    is none. Raises CheckpointDirError if the directory cannot be read."""
    images = os.path.join(directory, IMAGES)
    # A pod's container may itself be named "checkpoint".
    if os.path.lexists(images) and not os.path.isdir(os.path.join(images, IMAGES)):
        return [("", images)]
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        raise CheckpointDirError(f"cannot read {directory}: {error.strerror}") from error
    if INVENTORY in names or MANIFEST in names:
        return [("", directory)]
    places = [(name, os.path.join(directory, name, IMAGES)) for name in names if name[0] != "."]
    return [(name, place) for name, place in places if os.path.isdir(place)]


def verify_sums(directory: str, keys: Sequence[str] = ()) -> list[Problem] | None:
    """What differs from the directory's SHA256SUMS, which one of the `keys` must have signed if
    there are any; None where it has none.

    Raises CheckpointDirError if that cannot be read or is not one, or nobody vouches for it."""
    wanted = _read_sums(directory, keys)
    if wanted is None:
        return None
    problems = _differing(directory, wanted)
    here = set(_beside(directory)) - {SUMS, SUMS + SIGNATURE}
    problems += [Problem(name, "extra", f"is not in {SUMS}") for name in here - set(wanted)]
    return sorted(problems, key=lambda problem: problem.name)


def verify_beside(images: str, keys: Sequence[str] = ()) -> list[Problem]:
    """What differs from SHA256SUMS of the files that stand beside an image directory, and of its
    manifest. The sums lie beside it too, or for a pod's container one directory higher. Empty where
    there are none; with `keys` they must be there for all that a restore would use. Raises
    CheckpointDirError as verify_sums()."""
    parent, base = os.path.split(os.path.abspath(images))
    if base != IMAGES:
        return []
    directory, within = parent, ""
    if not os.path.lexists(os.path.join(parent, SUMS)):
        directory, container = os.path.split(parent)
        within = container + "/"
    wanted = _read_sums(directory, keys) or {}
    mine = {name: digest for name, digest in wanted.items() if name.startswith(within)}
    if not mine and not keys:
        return []  # another's, in a place for several checkpoints
    problems = _differing(directory, mine)
    used = [ROOTFS_DIFF, CONTAINER_LOG]
    used += [CONFIG_DUMP, SPEC_DUMP] if keys else []  # `gritctl restore` believes these
    used += [os.path.join(IMAGES, MANIFEST)] if mine else []  # else its own signature is all
    for name in used:
        if within + name not in mine and os.path.lexists(os.path.join(parent, name)):
            text = f"is not in {SUMS}" if mine else f"is not signed: there is no {SUMS}"
            problems.append(Problem(within + name, "extra", text))
    return sorted(problems, key=lambda problem: problem.name)


def _read_sums(directory: str, keys: Sequence[str] = ()) -> dict[str, str] | None:
    """SHA256SUMS as digests by name, None where there is none. Raises CheckpointDirError."""
    where = os.path.join(directory, SUMS)
    try:
        with open(where, "rb") as file:
            data = file.read(MAX_MANIFEST)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointDirError(f"{where}: cannot be read: {error.strerror}") from error
    if keys:
        from shim import signing

        signing.require(data, where, keys)
    text = data.decode("utf-8", "surrogateescape")
    wanted = {}
    # Not splitlines(): a damaged line's end must not be taken for another kind of it.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        digest, _, name = line.partition("  ")
        parts = name.split("/")
        if len(digest) != 64 or not name or ".." in parts or "" in parts or "\0" in name:
            raise CheckpointDirError(f"{where}, line {number}: is not a checksum and a file's name")
        wanted[name] = digest
    return wanted


def _differing(directory: str, wanted: dict[str, str]) -> list[Problem]:
    problems = []
    paths = {}
    for name in wanted:
        try:
            paths[name] = _sized(os.path.join(directory, name))
        except FileNotFoundError:
            problems.append(Problem(name, "missing", "is missing"))
        except OSError as error:
            problems.append(_unreadable(name, error))
    for name, found in digests.take(paths, plain=True).items():
        if isinstance(found, OSError):
            problems.append(_unreadable(name, found))
        elif found != wanted[name]:
            text = f"has SHA-256 {found}; {SUMS} says {wanted[name]}"
            problems.append(Problem(name, "checksum", text))
    return problems


def remove(directory: str) -> None:
    """Removes a checkpoint, damaged or whole. Under its final name it is there or it is gone, never
    half of it. Raises CheckpointDirError, with nothing changed, where something is in it that is
    no part of a checkpoint, or a dump is being written there."""
    directory = os.path.realpath(directory)
    parts = image_directories(directory)
    if not parts:
        raise CheckpointDirError(f"{directory} is not a checkpoint; nothing was removed")
    if parts[0][0] and not os.path.exists(os.path.join(directory, SUMS)):
        raise CheckpointDirError(
            f"{directory} has no {SUMS}, so it may be no pod's checkpoint but a place for several "
            f"checkpoints: {', '.join(name for name, _ in parts[:5])}. Nothing was removed; name "
            "those that are to go"
        )
    if parts != [("", directory)]:
        foreign = _foreign(directory, {name for name, _ in parts})
        if foreign:
            raise CheckpointDirError(
                f"{directory} holds what is no part of a checkpoint: {', '.join(foreign[:5])}. "
                "Nothing was removed; move it away first"
            )
    for _, images in parts:
        odd = [entry.name for entry in os.scandir(images) if entry.is_dir(follow_symlinks=False)]
        if odd:
            raise CheckpointDirError(
                f"{images} holds the directory {odd[0]}, which is no part of a checkpoint, or "
                "belongs to one that is just being written. Nothing was removed"
            )
    parent, base = os.path.split(directory)
    doomed = os.path.join(parent, _partial_prefix(base) + os.urandom(_RANDOM_BYTES).hex())
    try:
        os.rename(directory, doomed)
        _sync_directory(parent)
        _remove_tree(doomed)
    except OSError as error:
        raise CheckpointDirError(f"cannot remove {directory}: {reason(error)}") from error


def abandoned(directory: str) -> list[str]:
    """The drafts in `directory` whose owner is dead; `shutil.rmtree` may take them."""
    found = []
    for name in sorted(os.listdir(directory)):
        before, mark, _ = name.partition(_PARTIAL)
        if mark and _is_partial(name, before.removeprefix(".")):
            path = os.path.join(directory, name)
            lock = _open_and_lock(path, unlockable=False)
            if lock is not None:
                os.close(lock)
                found.append(path)
    return found


def _foreign(directory: str, containers: set[str]) -> list[str]:
    """What lies in a checkpoint's directory without being a part of it."""
    found = []
    for name in sorted(os.listdir(directory)):
        if name in containers:
            inner = _foreign(os.path.join(directory, name), set())
            found += [os.path.join(name, one) for one in inner]
        elif name != IMAGES and name not in _BESIDE:
            found.append(name)
    return found


def _beside(directory: str) -> list[str]:
    """The files of a checkpoint that its manifests do not speak of, and the manifests, by names
    relative to `directory`. Image directories that we may not read (root's) are left out."""
    found = []
    for base, folders, files in os.walk(directory):
        inside = os.path.relpath(base, directory)
        names = files
        if os.path.basename(base) == IMAGES and IMAGES not in folders:
            folders.clear()
            names = [name for name in files if name == MANIFEST]
        folders[:] = [name for name in folders if not _is_partial(name, "")]
        found += [os.path.normpath(os.path.join(inside, name)) for name in names]
    return found


def rootfs_diff(images: str) -> str | None:
    """`rootfs-diff.tar` beside an image directory, if there is one."""
    return _lies_beside(images, ROOTFS_DIFF)


def container_log(images: str) -> str | None:
    """`container.log` beside an image directory, if there is one."""
    return _lies_beside(images, CONTAINER_LOG)


def beside(images: str) -> tuple[str, list[str]]:
    """The directory that holds an image directory in GRIT's layout ("" in another), and those files
    in it that a restore makes use of."""
    parent, base = os.path.split(os.path.abspath(images))
    if base != IMAGES:
        return "", []
    names = (ROOTFS_DIFF, CONTAINER_LOG, CONFIG_DUMP, SPEC_DUMP, SUMS)
    paths = [os.path.join(parent, name) for name in names]
    return parent, [path for path in paths if os.path.lexists(path)]


def is_downloaded(directory: str) -> bool:
    """Whether GRIT's agent has said, by a file, that it has brought a pod's checkpoints here (grit:
    pkg/gritagent/copy/copy.go)."""
    return os.path.exists(os.path.join(directory, DOWNLOADED))


def _lies_beside(images: str, name: str) -> str | None:
    """Only beside a directory named `checkpoint`: other names are not GRIT's layout, and what lies
    beside them (in /tmp, say) belongs to somebody else."""
    parent, base = os.path.split(os.path.abspath(images))
    path = os.path.join(parent, name)
    return path if base == IMAGES and os.path.isfile(path) else None


def _no_manifest(directory: str) -> ManifestError:
    try:
        names = os.listdir(directory)
    except OSError as error:
        return ManifestError(f"cannot read the checkpoint {directory}: {error.strerror}")
    if any(_is_partial(name, "") for name in names):
        return ManifestError(
            f"{directory} is not a whole checkpoint: writing it was cut short. Remove it"
        )
    if INVENTORY in names:
        return ForeignCheckpoint(
            f"{directory} has no {MANIFEST}: another tool wrote it, and whether its files are "
            "whole cannot be checked"
        )
    return ManifestError(
        f"{directory} is not a checkpoint: it has neither {MANIFEST} nor {INVENTORY}"
    )


def _unreadable(name: str, error: OSError) -> Problem:
    return Problem(name, "checksum", f"cannot be read: {error.strerror}")


def _sized(path: str) -> tuple[str, int]:
    return path, os.stat(path, follow_symlinks=False).st_size


def _write_new(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _partial_prefix(base: str) -> str:
    """A draft beside its final directory carries that one's name, within it none."""
    return f".{base}{_PARTIAL}" if base else _PARTIAL


def _is_partial(name: str, base: str) -> bool:
    prefix = _partial_prefix(base)
    tail = name[len(prefix) :]
    return (
        name.startswith(prefix)
        and len(tail) == 2 * _RANDOM_BYTES
        and set(tail) <= set("0123456789abcdef")
    )


def remove_abandoned(directory: str, base: str) -> None:
    """Removes the drafts in `directory` for a checkpoint named `base` ("" for one that is written
    within it) whose owner is dead: of our user, under our names, with a free lock. What cannot be
    removed is left."""
    try:
        names = [name for name in os.listdir(directory) if _is_partial(name, base)]
    except OSError:
        return  # not to be listed; begin() meets the reason again and tells it
    for name in names:
        path = os.path.join(directory, name)
        lock = None
        try:
            if os.lstat(path).st_uid == os.geteuid():
                lock = _open_and_lock(path, unlockable=False)
            if lock is not None:
                _remove_tree(path)
        except OSError:
            continue  # it costs room, and no more; the new draft has another name
        finally:
            if lock is not None:
                os.close(lock)


def remove_draft(path: str) -> None:
    """Removes a draft whose owner was killed. What cannot be removed is left."""
    directory, name = os.path.split(path)
    before, mark, _ = name.partition(_PARTIAL)
    if mark:
        remove_abandoned(directory, before.removeprefix("."))


def _open_and_lock(path: str, *, unlockable: bool = True) -> int | None:
    """A descriptor holding the directory's lock; None if another has it or the directory went.

    Where the file system has no such locks: a descriptor without, or None if not `unlockable`.
    """
    import fcntl

    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), os.lstat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if unlockable:
            return fd
    os.close(fd)
    return None


def _remove_tree(path: str) -> None:
    import shutil

    shutil.rmtree(path)


def _must_be_empty(path: str, but: str | None = None) -> None:
    try:
        names = sorted(name for name in os.listdir(path) if name != but)
    except OSError as error:
        raise CheckpointDirError(
            f"cannot write a checkpoint to {path}: {error.strerror}"
        ) from error
    if any(_is_partial(name, "") for name in names):
        raise CheckpointDirError(f"another checkpoint is just being written to {path}")
    if names:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise CheckpointDirError(
            f"cannot write a checkpoint to {path}: it is not empty (it has {shown}). Name another "
            "directory, or remove this one"
        )


def _is_mount_point(path: str) -> bool:
    """Also true of a bind mount within one file system, which os.path.ismount() does not see."""
    if os.path.ismount(path):
        return True
    wanted = os.fsencode(path)
    with open("/proc/self/mountinfo", "rb") as file:
        points = [line.split(b" ")[4] for line in file]
    for plain, escaped in (
        (b"\\", b"\\134"),
        (b" ", b"\\040"),
        (b"\t", b"\\011"),
        (b"\n", b"\\012"),
    ):
        wanted = wanted.replace(plain, escaped)
    return wanted in points


def listed(problems: Sequence[Problem]) -> str:
    """For a message: a few, and how many more."""
    shown = "; ".join(map(str, problems[:5]))
    return shown + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


def reason(error: OSError) -> str:
    """For people, with the file's name where it is known."""
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
