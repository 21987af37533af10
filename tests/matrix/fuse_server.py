"""A file system in user space that fails on demand; runs in a node, with its plain Python.

    python3 fuse_server.py MOUNTPOINT BACKING CONTROL

It shows BACKING at MOUNTPOINT, and looks into the file CONTROL before each request: `fail OP PART`
has the operation, on files with PART in their path, answered with EIO, `slow OP PART` after a
while, `stop OP PART` has it, and all after it, wait until the file says otherwise. Since the first
of them there is a file CONTROL.met. The numbers are the kernel's (include/uapi/linux/fuse.h, 7.31).
"""

import ctypes
import errno
import os
import select
import stat
import struct
import sys
import time

LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME = 1, 2, 3, 4, 9, 10, 11, 12
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT = 14, 15, 16, 17, 18, 20, 25, 26
OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, ACCESS, CREATE = 27, 28, 29, 30, 34, 35
INTERRUPT, DESTROY, BATCH_FORGET, RENAME2 = 36, 38, 42, 45
SILENT = (FORGET, INTERRUPT, BATCH_FORGET)
NAMES = {"read": (READ,), "write": (WRITE,), "rename": (RENAME, RENAME2)}
NAMES["fsync"] = (FSYNC, FSYNCDIR)
SET_MODE, SET_SIZE = 1, 8
BUFFER = 1 << 20
SLOW_SECONDS = 0.02

mountpoint, backing, control = sys.argv[1:]
paths = {1: backing}
numbers = {backing: 1}
stopped_by = ""


def number_of(path: str) -> int:
    if path not in numbers:
        numbers[path] = max(paths) + 1
        paths[numbers[path]] = path
    return numbers[path]


def moved(old: str, new: str) -> None:
    for path in [one for one in numbers if one == old or one.startswith(f"{old}/")]:
        number = numbers.pop(path)
        paths[number] = new + path[len(old) :]
        numbers[paths[number]] = number


def attributes(path: str) -> bytes:
    found = os.lstat(path)
    times = [found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns]
    return struct.pack(
        "<6Q10I",
        number_of(path),
        found.st_size,
        found.st_blocks,
        *(t // 10**9 for t in times),
        *(t % 10**9 for t in times),
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        0,
        4096,
        0,
    )


def entry(path: str) -> bytes:
    return struct.pack("<QQQQII", number_of(path), 0, 0, 0, 0, 0) + attributes(path)


def listing(path: str, offset: int, size: int) -> bytes:
    out = b""
    names = [".", "..", *sorted(os.listdir(path))]
    for at, name in list(enumerate(names))[offset:]:
        raw = name.encode()
        kind = stat.S_IFMT(os.lstat(os.path.join(path, name)).st_mode) >> 12
        one = struct.pack("<QQII", at + 1, at + 1, len(raw), kind) + raw
        one += bytes(-len(one) % 8)
        if len(out) + len(one) > size:
            break
        out += one
    return out


def answer(op: int, node: int, body: bytes) -> bytes:
    """The answer's body; OSError for the kernel's errors."""
    path = paths.get(node, backing)

    def child(name: bytes) -> str:
        return os.path.join(path, name.rstrip(b"\0").decode())

    if op == INIT:
        return struct.pack("<4I2H2I2H2I24x", 7, 31, 0, 0, 16, 12, 128 << 10, 1, 0, 0, 0, 0)
    if op == LOOKUP:
        return entry(child(body))
    if op in (GETATTR, SETATTR):
        if op == SETATTR:
            valid, _, _, size = struct.unpack_from("<IIQQ", body)
            if valid & SET_SIZE:
                os.truncate(path, size)
            if valid & SET_MODE:
                os.chmod(path, struct.unpack_from("<I", body, 68)[0] & 0o7777)
        return struct.pack("<QII", 0, 0, 0) + attributes(path)
    if op == MKDIR:
        os.mkdir(child(body[8:]), struct.unpack_from("<I", body)[0] & 0o7777)
        return entry(child(body[8:]))
    if op == UNLINK:
        os.unlink(child(body))
        numbers.pop(child(body), None)
    elif op == RMDIR:
        os.rmdir(child(body))
        numbers.pop(child(body), None)
    elif op in (RENAME, RENAME2):
        flags = struct.unpack_from("<I", body, 8)[0] if op == RENAME2 else 0
        old, new = body[8 if op == RENAME else 16 :].rstrip(b"\0").split(b"\0")
        target = os.path.join(paths[struct.unpack_from("<Q", body)[0]], new.decode())
        if flags & 1 and os.path.lexists(target):  # RENAME_NOREPLACE
            raise OSError(errno.EEXIST, "")
        if flags & ~1:
            raise OSError(errno.EINVAL, "")
        os.rename(child(old), target)
        numbers.pop(target, None)
        moved(child(old), target)
    elif op in (OPEN, OPENDIR):
        flags = struct.unpack_from("<I", body)[0] if op == OPEN else os.O_DIRECTORY
        return struct.pack("<QII", os.open(path, flags & ~os.O_CREAT), 0, 0)
    elif op == CREATE:
        flags, mode = struct.unpack_from("<II", body)
        fd = os.open(child(body[16:]), flags | os.O_CREAT, mode & 0o7777)
        return entry(child(body[16:])) + struct.pack("<QII", fd, 0, 0)
    elif op in (READ, READDIR):
        fd, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(fd, size, offset) if op == READ else listing(path, offset, size)
    elif op == WRITE:
        fd, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(fd, body[40 : 40 + size], offset), 0)
    elif op in (RELEASE, RELEASEDIR):
        os.close(struct.unpack_from("<Q", body)[0])
    elif op == STATFS:
        about = os.statvfs(backing)
        counts = (about.f_blocks, about.f_bfree, about.f_bavail, about.f_files, about.f_ffree)
        return struct.pack("<5Q4I24x", *counts, about.f_bsize, 255, about.f_frsize, 0)
    elif op not in (FSYNC, FSYNCDIR, DESTROY):  # FLUSH: no killed process waits for it at its end
        raise OSError(errno.ENOSYS, "")
    return b""


def told(op: int, path: str) -> str:
    """What CONTROL has us do about it: fail, slow, stop, or nothing."""
    global stopped_by
    try:
        with open(control) as file:
            text = file.read()
        act, name, *part = text.split()
    except (FileNotFoundError, ValueError):
        text = act = ""
    if stopped_by and stopped_by == text:
        return "stop"  # also when who came by first waits no longer
    stopped_by = ""
    if not act or op not in NAMES[name] or not all(one in path for one in part):
        return ""
    open(f"{control}.met", "w").close()
    if act == "stop":
        stopped_by = text
    return act


def respond(request: bytes, act: str) -> None:
    _, op, unique, node = struct.unpack_from("<IIQQ", request)
    code, out = 0, b""
    try:
        if act == "fail":
            raise OSError(errno.EIO, "")
        if act == "slow":
            time.sleep(SLOW_SECONDS)
        out = answer(op, node, request[40:])
    except OSError as error:
        code = error.errno or errno.EIO
    if op not in SILENT:
        reply(unique, code, out)


def reply(unique: int, code: int, out: bytes) -> None:
    try:
        os.write(fuse, struct.pack("<IiQ", 16 + len(out), -code, unique) + out)
    except FileNotFoundError:
        pass  # who asked has been killed


def main() -> None:
    options = f"fd={fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"failing", mountpoint.encode(), b"fuse", 0, options.encode()):
        sys.exit(os.strerror(ctypes.get_errno()))
    waiting: list[bytes] = []
    while True:
        if select.select([fuse], [], [], 0.01 if waiting else None)[0]:
            try:
                request = os.read(fuse, BUFFER)
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return  # unmounted
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            if struct.unpack_from("<IIQQ", request)[1] == INTERRUPT:
                # A signal, as the one that kills: an NFS client, too, then waits no longer.
                (of,) = struct.unpack_from("<Q", request, 40)
                for one in [one for one in waiting if struct.unpack_from("<8xQ", one)[0] == of]:
                    waiting.remove(one)
                    reply(of, errno.EINTR, b"")
                continue
            waiting.append(request)
        while waiting:
            _, op, _, node = struct.unpack_from("<IIQQ", waiting[0])
            act = told(op, paths.get(node, backing))
            if act == "stop":
                break
            respond(waiting.pop(0), act)


fuse = os.open("/dev/fuse", os.O_RDWR)
main()
