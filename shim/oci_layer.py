"""A program that unpacks an OCI layer (a tar of changes) onto a root file system:
TAR ROOTFS BYTES ENTRIES.

The result is what containerd's own `archive.Apply` gives: `.wh.NAME` removes NAME, `.wh..wh..opq`
hides what lower layers put into a directory and keeps what this layer does, a directory merges
into a directory and anything else replaces what it finds, owners, modes, times and extended
attributes are the layer's. The tar is not trusted. All work is done after a chroot into the root
file system, which makes every link in it harmless, and names that lead upwards are refused even
so; once inside, nothing may be imported, since it would be the container's code that ran.

Of device nodes it makes those that any container has, and lets those stand that are there already;
the others are left out. At most BYTES are written and ENTRIES made (0: no limit of their own), and
never more than 15 of 16 parts of what the file system has free; its own memory is limited, too.

Exit status 0, with a line on stdout for each thing left out; or 1, with the reason on stderr.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import resource
import shutil
import stat
import sys
import tarfile
from collections.abc import Iterator
from typing import IO, cast

_WHITEOUT = b".wh."
_WHITEOUT_META = b".wh..wh."  # aufs's own; of these only the opaque marker means anything now
_OPAQUE = b".wh..wh..opq"
_XATTR = "SCHILY.xattr."
_BLOCK = 1 << 20
_MEMORY = 1 << 30  # bytes of address space; no honest layer's headers need a tenth of it
_MAX_EXTENDED = 1 << 20  # bytes of a long name or a PAX header; Go's archive/tar draws it there too
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


# null, zero, full, random, urandom, tty, ptmx: what runc puts into every container's /dev
# (libcontainer specconv.AllowedDevices), and what a chroot or an image built within one has.
_ANYBODYS = {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)}


class LayerError(Exception):
    """The layer cannot be unpacked; says which entry, and why."""


class Entry(tarfile.TarInfo):
    """An entry whose header must be whole: tarfile by itself takes a bad one for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Entry:
        try:
            entry = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            # Ending without the two zero blocks is fine with Go, and so with containerd.
            raise tarfile.EOFHeaderError("end of file header") from None  # type: ignore[attr-defined]
        except tarfile.HeaderError as error:
            raise LayerError(f"is no tar archive, or a damaged one ({error})") from error
        if entry.type in _EXTENDED and not 0 <= entry.size <= _MAX_EXTENDED:
            raise LayerError(f"has an extended header of {entry.size} bytes")
        return entry


class _Forward:
    """A stream with the few methods tarfile needs of a file; seeking ahead reads, back it cannot.

    (tarfile's own stream mode cannot seek ahead in an entry, so not over a sparse file's holes.)
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0

    def read(self, size: int) -> bytes:
        """All of `size` bytes unless the stream ends."""
        parts = []
        while size > 0 and (part := self._stream.read(min(size, _BLOCK))):
            parts.append(part)
            size -= len(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def seek(self, position: int) -> int:
        while self._position < position and self.read(min(position - self._position, _BLOCK)):
            pass
        if self._position > position:
            raise LayerError("would have to be read backwards")
        return self._position

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True


class _Room:
    """What may still be written and made."""

    def __init__(self, most_bytes: int, most_entries: int) -> None:
        """Of the file system at "/"; 0 for no limit but what is free there."""
        found = os.statvfs("/")
        free = found.f_bavail * found.f_frsize
        self._bytes = self._all_bytes = min(most_bytes or free, free - free // 16)
        self._entries = most_entries or sys.maxsize
        if found.f_files:  # btrfs and others have no fixed number
            self._entries = min(self._entries, found.f_favail - found.f_favail // 16)
        self._all_entries = self._entries

    def take(self, size: int) -> None:
        self._bytes -= size
        if self._bytes < 0:
            raise LayerError(
                f"would be more than the {self._all_bytes} bytes that may be written here"
            )

    def take_entry(self) -> None:
        self._entries -= 1
        if self._entries < 0:
            raise LayerError(f"would be more than the {self._all_entries} files there may be here")


def main(arguments: list[str]) -> int:
    try:
        tar, rootfs, most_bytes, most_entries = arguments
        limits = int(most_bytes), int(most_entries)
    except ValueError:
        print("usage: oci_layer TAR ROOTFS BYTES ENTRIES", file=sys.stderr)
        return 2
    try:
        with open(tar, "rb") as file:
            layer = _decompressed(file)
            _enter(rootfs)
            resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
            for notice in _unpack(layer, _Room(*limits)):
                print(notice)
            while layer.read(_BLOCK):  # to the end, where the compression's checksum is
                pass
    except LayerError as error:
        print(error, file=sys.stderr)
        return 1
    except MemoryError:
        print(f"its headers need more than {_MEMORY} bytes of memory", file=sys.stderr)
        return 1
    except Exception as error:  # a traceback would need imports, and the reader wants one line
        print(_reason(error), file=sys.stderr)
        return 1
    return 0


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic[:3] == b"\x1f\x8b\x08":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    # A zstd stream may begin with a skippable frame (RFC 8878, 3.1.2).
    if magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        return _zstd(file)
    return file


def _zstd(file: IO[bytes]) -> IO[bytes]:
    if sys.version_info >= (3, 14):
        from compression import zstd

        return cast(IO[bytes], zstd.open(file))
    try:
        import zstandard
    except ImportError:
        raise LayerError(
            "is compressed with zstd, which needs Python 3.14 or the package zstandard "
            "(python3-zstandard in Debian)"
        ) from None
    reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    return cast(IO[bytes], reader)


def _enter(rootfs: str) -> None:
    if os.path.samestat(os.stat(rootfs), os.stat("/")):
        raise LayerError("would be unpacked onto this machine's own root file system")
    os.chroot(rootfs)
    os.chdir("/")
    os.umask(0o022)  # makedirs() gives its mode to the last directory only
    sys.meta_path.clear()


def _unpack(layer: IO[bytes], room: _Room) -> Iterator[str]:
    """Unpacks onto "/", yielding a line for each thing left out."""
    unpacked: set[bytes] = set()  # and the directories above, so that opaque markers spare them
    directories: list[tuple[bytes, tuple[int, int]]] = []
    for archive, entry in _entries(layer):
        try:
            room.take_entry()
            parts = _parts(entry.name)
            if not parts or (parts[0].startswith(_WHITEOUT_META) and parts[0] != _OPAQUE):
                continue
            parent = _resolved(parts[:-1])
            os.makedirs(parent, 0o755, exist_ok=True)
            path = os.path.join(parent, parts[-1])
            if parts[-1] == _OPAQUE:
                _hide_lower(parent, unpacked)
            elif parts[-1].startswith(_WHITEOUT):
                hidden = parts[-1][len(_WHITEOUT) :]
                if hidden in (b"", b".", b".."):
                    raise LayerError("is not a whiteout of anything")
                _remove(os.path.join(parent, hidden))
            else:
                if not _create(archive, entry, path, room):
                    device = f"{entry.devmajor}:{entry.devminor}"
                    yield f"{entry.name!r}: device node {device} left out"
                    continue
                yield from _set_attributes(entry, path)
                if entry.isdir():
                    directories.append((path, _times(entry)))
                while path not in unpacked:
                    unpacked.add(path)
                    path = os.path.dirname(path)
        except MemoryError:
            raise
        except Exception as error:
            raise LayerError(f"{entry.name!r}: {_reason(error)}") from error
    # Only now, since each entry made in a directory changed its time.
    for path, times in directories:
        if os.path.isdir(path) and not os.path.islink(path):
            os.utime(path, ns=times)


def _entries(layer: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    with tarfile.open(
        fileobj=cast(IO[bytes], _Forward(layer)),
        mode="r:",
        tarinfo=Entry,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # it would remember them all
            yield archive, entry


def _bytes(text: str) -> bytes:
    """A name or value as it stands in the archive, whatever its encoding."""
    return text.encode("utf-8", "surrogateescape")


def _parts(name: str) -> list[bytes]:
    """A name's components below the root, absolute or not."""
    parts = [part for part in _bytes(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise LayerError("leads upwards; a layer has no business outside its root")
    if any(b"\0" in part for part in parts):
        raise LayerError("has a NUL in its name")
    return parts


def _resolved(parts: list[bytes]) -> bytes:
    """A directory, with symbolic links followed (in the chroot, so within the root)."""
    return os.path.realpath(b"/" + b"/".join(parts))


def _remove(path: bytes) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _hide_lower(directory: bytes, unpacked: set[bytes]) -> None:
    with os.scandir(directory) as entries:
        for entry in list(entries):
            if entry.path not in unpacked:
                _remove(entry.path)
            elif entry.is_dir(follow_symlinks=False):
                _hide_lower(entry.path, unpacked)


def _create(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: bytes, room: _Room) -> bool:
    """False for a device node that no layer may bring; what was at its place is gone then."""
    try:
        present = os.lstat(path)
    except FileNotFoundError:
        present = None
    if entry.isdir() and present and stat.S_ISDIR(present.st_mode):
        return True
    device = entry.ischr() or entry.isblk()
    if device:
        kind = stat.S_IFCHR if entry.ischr() else stat.S_IFBLK
        number = os.makedev(entry.devmajor, entry.devminor)
        if present and (stat.S_IFMT(present.st_mode), present.st_rdev) == (kind, number):
            return True
    _remove(path)
    if device:
        if not entry.ischr() or (entry.devmajor, entry.devminor) not in _ANYBODYS:
            return False
        os.mknod(path, kind | 0o600, number)
        return True
    if entry.isdir():
        os.mkdir(path, 0o700)
    elif entry.isreg():
        _write_file(archive, entry, path, room)
    elif entry.issym():
        os.symlink(_bytes(entry.linkname), path)
    elif entry.islnk():
        target = _parts(entry.linkname)
        if not target:
            raise LayerError("is a hard link to the root directory")
        source = os.path.join(_resolved(target[:-1]), target[-1])
        try:
            os.link(source, path, follow_symlinks=False)
        except OSError as error:
            reason = f"hard link to {entry.linkname!r}: {error.strerror}"
            raise LayerError(reason) from error
    elif entry.isfifo():
        os.mkfifo(path, 0o600)
    else:
        raise LayerError(f"is of type {entry.type!r}, which no layer has")
    return True


def _write_file(archive: tarfile.TarFile, entry: tarfile.TarInfo, path: bytes, room: _Room) -> None:
    # Of a sparse file the archive holds these extents; what lies between stays a hole.
    sparse = cast(list[tuple[int, int]] | None, entry.sparse)
    extents = [(0, entry.size)] if sparse is None else sparse
    room.take(sum(max(length, 0) for _, length in extents))
    source = archive.extractfile(entry)
    assert source is not None
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "wb", buffering=0) as file:
        for start, length in extents:
            source.seek(start)
            file.seek(start)
            left = length
            while left > 0:
                data = source.read(min(left, _BLOCK))
                if not data:
                    raise LayerError("is cut short")
                _write_all(fd, data)
                left -= len(data)
        if sparse is not None:
            file.truncate(entry.size)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _set_attributes(entry: tarfile.TarInfo, path: bytes) -> Iterator[str]:
    """In the one order that works: chown takes set-id bits and file capabilities away."""
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    for key, value in entry.pax_headers.items():
        if not key.startswith(_XATTR):
            continue
        name = key[len(_XATTR) :]
        if name.startswith("trusted."):
            yield f"{entry.name!r}: extended attribute {name!r} left out: it is the host's to set"
            continue
        try:
            os.setxattr(path, _bytes(name), _bytes(value), follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise LayerError(f"extended attribute {name!r}: {error.strerror}") from error
            yield f"{entry.name!r}: extended attribute {name!r} left out: {error.strerror}"
    if not os.path.islink(path):
        os.chmod(path, entry.mode & 0o7777)
    os.utime(path, ns=_times(entry), follow_symlinks=False)


def _times(entry: tarfile.TarInfo) -> tuple[int, int]:
    """Access and modification time in ns; containerd lets the former be no earlier."""
    modified = _bounded(_nanoseconds(entry.pax_headers.get("mtime", str(int(entry.mtime)))))
    accessed = _bounded(_nanoseconds(entry.pax_headers.get("atime", "0")))
    return max(accessed, modified), modified


def _nanoseconds(seconds: str) -> int:
    """Of a PAX time, exactly; the float that tarfile makes of it is too coarse."""
    match = re.fullmatch(r"(-?)(\d{1,20})(?:\.(\d*))?", seconds, re.ASCII)
    if match is None:
        raise LayerError(f"has the time {seconds!r}")
    value = int(match[2]) * 10**9 + int((match[3] or "")[:9].ljust(9, "0"))
    return -value if match[1] else value


def _bounded(time: int) -> int:
    """Times that a Go int64 of nanoseconds cannot hold, and those before 1970, become 1970."""
    return time if 0 <= time < 1 << 63 else 0


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
