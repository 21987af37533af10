"""The simulated GPU as tests see it: build the kit, lay out the boards, put them into a container's
spec, make things go wrong, and look who holds device memory. Knows nothing of grit; must never be
imported by the product.

A *kit* is what is built once: `lib/libcuda.so.1` and `lib/libnvidia-ml.so.1`, the workload, and a
C library of its own for images that have none. A *board directory* is the state of one machine's
GPUs; it must outlive the containers that use it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

SOURCE = Path(__file__).parent / "src"
LIBRARIES = {
    "libcuda": ("api.c", "board.c", "caller.c", "driver.c", "faults.c", "gate.c"),
    "libnvidia-ml": ("nvml.c",),
}

# Where a container finds things. The workload's ELF interpreter is below KIT, so it is fixed.
KIT = "/opt/simgpu"
BOARDS = "/run/simgpu"
WORKLOAD = f"{KIT}/bin/simgpu-workload"

PAGE = 65536
OWNER_BYTE = 1 << 41  # board.c
HEADER_BYTES = 4096

RUNNING, LOCKED, CHECKPOINTED, FAILED = range(4)

SUCCESS = 0
INVALID_VALUE = 1
OUT_OF_MEMORY = 2
NOT_INITIALIZED = 3
INVALID_DEVICE = 101
OPERATING_SYSTEM = 304
ILLEGAL_STATE = 401
NOT_READY = 600


class Kit(NamedTuple):
    """A built kit on the host."""

    root: Path

    @property
    def libcuda(self) -> Path:
        return self.root / "lib/libcuda.so.1"

    @property
    def workload(self) -> Path:
        """For processes of the host itself; in a container use WORKLOAD."""
        return self.root / "bin/simgpu-workload-host"


def build(cache: Path) -> Kit:
    """Compile the kit below `cache`, once per state of its sources. Needs gcc.

    Build on the oldest system it must run on: the library needs that glibc or a newer one.
    """
    digest = hashlib.sha256()
    for source in sorted(SOURCE.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    kit = Kit(cache / f"simgpu-{digest.hexdigest()[:16]}")
    if kit.root.exists():
        return kit
    cache.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="simgpu-draft-", dir=cache))
    try:
        _compile(draft)
        draft.chmod(0o755)
        try:
            draft.rename(kit.root)
        except OSError as e:  # another builder was first
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return kit


def _compile(root: Path) -> None:
    for part in ("lib", "libc", "bin"):
        (root / part).mkdir()
    gcc = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    for name, parts in LIBRARIES.items():
        link = ["-shared", "-fPIC", f"-Wl,-soname,{name}.so.1"]
        version_script = f"-Wl,--version-script={SOURCE / name}.map"
        _run(
            [*gcc, *link, version_script, "-o", str(root / f"lib/{name}.so.1")]
            + [str(SOURCE / part) for part in parts]
        )
    workload = str(SOURCE / "workload.c")
    host = str(root / "bin/simgpu-workload-host")
    _run([*gcc, "-o", host, workload])
    interpreter = Path(_run(["gcc", "-print-file-name=ld-linux-x86-64.so.2"]).strip()).resolve()
    libc = Path(_run(["gcc", "-print-file-name=libc.so.6"]).strip()).resolve()
    shutil.copy(interpreter, root / "libc/ld-linux-x86-64.so.2")
    shutil.copy(libc, root / "libc/libc.so.6")
    boxed = [
        f"-Wl,--dynamic-linker={KIT}/libc/ld-linux-x86-64.so.2",
        f"-Wl,--disable-new-dtags,-rpath,{KIT}/libc:{KIT}/lib",
    ]
    _run([*gcc, *boxed, "-o", str(root / "bin/simgpu-workload"), workload])


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def default_cache() -> Path:
    """Where the tests keep what is slow to make, outside the tree."""
    return Path(os.environ.get("GRIT_CACHE", "/var/cache/grit-tests"))


def refused_device() -> os.stat_result:
    """A character device that opens without effect and that CRIU cannot dump, as /dev/nvidia0.

    The kernel's misc devices differ from machine to machine, so look.
    """
    for name in ("fuse", "loop-control", "vsock", "hwrng", "kvm"):
        try:
            os.close(os.open(f"/dev/{name}", os.O_RDWR))
        except OSError:
            continue
        return os.stat(f"/dev/{name}")
    raise RuntimeError("no character device fit to stand for /dev/nvidia0 on this machine")


class HasPath(Protocol):
    """What is used of a node: the host's view of a path in it."""

    def path(self, path: str) -> Path: ...


class SimGpu:
    """The GPUs of one machine, in `directory` on the host.

    `directory_as` and `kit_as` are the same two places in the eyes of whoever starts containers,
    where that is a node with a mount namespace of its own. `capacity` is bytes per GPU; they are
    written in full by `create`, so that a container using them is charged nothing for them.
    """

    def __init__(
        self,
        directory: Path,
        kit: Kit,
        *,
        gpus: int = 1,
        capacity: int = 64 << 20,
        directory_as: Path | None = None,
        kit_as: Path | None = None,
    ) -> None:
        self.directory = directory
        self.kit = kit
        self.gpus = gpus
        self.capacity = capacity // PAGE * PAGE
        self.directory_as = directory_as or directory
        self.kit_as = kit_as or kit.root
        self.device = refused_device()
        self._library: Library | None = None

    @classmethod
    def in_node(cls, node: HasPath, kit: Kit, **options: Any) -> SimGpu:
        """The GPUs of a node that was made with `binds={KIT: kit.root}`."""
        directory = node.path(BOARDS)
        return cls(directory, kit, directory_as=Path(BOARDS), kit_as=Path(KIT), **options)

    def create(self) -> SimGpu:
        (self.directory / "control").mkdir(parents=True)
        (self.directory / "dev").mkdir()
        for gpu in range(self.gpus):
            board = self.directory / f"gpu{gpu}"
            board.mkdir()
            pages = self.capacity // PAGE
            header = struct.pack("<8sII16s", b"simgpu1", PAGE, pages, self.uuid(gpu).bytes)
            (board / "table").write_bytes(header.ljust(HEADER_BYTES, b"\0") + bytes(4 * pages))
            with open(board / "memory", "wb") as memory:
                for _ in range(pages):
                    memory.write(b"\xdb" * PAGE)
            node = self.directory / f"dev/nvidia{gpu}"
            os.mknod(node, stat.S_IFCHR | 0o666, self.device.st_rdev)
        return self

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    @staticmethod
    def uuid(gpu: int) -> uuid.UUID:
        """The same on every machine, so that a checkpoint restores without a device map."""
        return uuid.uuid5(uuid.NAMESPACE_OID, f"simulated GPU {gpu}")

    def host_env(self) -> dict[str, str]:
        """Environment for CUDA processes that are plain processes of the host."""
        return {
            "SIMGPU_DIR": str(self.directory),
            "SIMGPU_DEV_PREFIX": str(self.directory / "dev/nvidia"),
            "LD_LIBRARY_PATH": str(self.kit.libcuda.parent),
        }

    def container_env(self) -> list[str]:
        return [f"SIMGPU_DIR={BOARDS}", f"LD_LIBRARY_PATH={KIT}/lib"]

    def container_mounts(self) -> list[dict[str, Any]]:
        """OCI mounts: the kit read-only, the boards writable."""
        return [
            _bind(KIT, self.kit_as, "ro"),
            _bind(BOARDS, self.directory_as, "rw"),
        ]

    def container_devices(self) -> list[dict[str, Any]]:
        """OCI `linux.devices`: /dev/nvidia0 and its fellows."""
        rdev = self.device.st_rdev
        return [
            {
                "path": f"/dev/nvidia{gpu}",
                "type": "c",
                "major": os.major(rdev),
                "minor": os.minor(rdev),
                "fileMode": 0o666,
            }
            for gpu in range(self.gpus)
        ]

    def add_to(self, spec: dict[str, Any]) -> None:
        """Give the container of this OCI spec the GPUs, as a GPU runtime's hook would."""
        rdev = self.device.st_rdev
        spec["process"].setdefault("env", []).extend(self.container_env())
        spec.setdefault("mounts", []).extend(self.container_mounts())
        linux = spec.setdefault("linux", {})
        linux.setdefault("devices", []).extend(self.container_devices())
        linux.setdefault("resources", {}).setdefault("devices", []).append(
            {
                "allow": True,
                "type": "c",
                "major": os.major(rdev),
                "minor": os.minor(rdev),
                "access": "rwm",
            }
        )

    @property
    def library(self) -> Library:
        if self._library is None:
            self._library = Library(self.kit.libcuda)
        return self._library

    def fault(self, words: str, pid: int | None = None) -> None:
        """From now on these things go wrong in process `pid` (host pid), or in every process.

        Words, separated by commas: `OP=CODE` and `OP=hang` for OP in getstate, lock, checkpoint,
        restore, unlock; `alloc=CODE`; `lock=never`; `checkpoint=failed`, `restore=failed`,
        `unlock=failed` (error 304 and the state FAILED); `checkpoint=hidden` (a copy that is made,
        but not in memory of the process's own); `speed=BYTES_PER_S` for the copies. They replace
        the words given before; an empty string ends them.
        """
        name = "all" if pid is None else self.library.token_of(pid)
        draft = self.directory / "control/.draft"
        draft.write_text(words)
        draft.rename(self.directory / "control" / name)

    def end_faults(self) -> None:
        for entry in (self.directory / "control").iterdir():
            entry.unlink()

    @contextmanager
    def mode(self, word: str) -> Iterator[None]:
        """NVML says meanwhile that all processes run on "mig" instances, or as "mps" clients."""
        file = self.directory / "mode"
        file.write_text(word)
        try:
            yield
        finally:
            file.unlink()

    @contextmanager
    def faulty(self, words: str, pid: int | None = None) -> Iterator[None]:
        self.fault(words, pid)
        try:
            yield
        finally:
            self.end_faults()

    def owners(self, *gpus: int) -> dict[int, int]:
        """Bytes of device memory held on these GPUs, or on all, by host pid of the living owner.
        Empty: nothing leaked.

        A process with its GPU attached but no memory is there with 0 bytes.
        """
        held: dict[int, int] = {}
        for gpu in gpus or range(self.gpus):
            with open(self.directory / f"gpu{gpu}/table", "rb") as table:
                table.seek(HEADER_BYTES)
                slots = struct.unpack(f"<{self.capacity // PAGE}I", table.read())
                for slot, pid in _lock_holders(table.fileno()):
                    held[pid] = held.get(pid, 0) + slots.count(slot) * PAGE
        return held


def _bind(destination: str, source: Path, mode: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", mode],
    }


def _lock_holders(table: int) -> Iterator[tuple[int, int]]:
    """Owner slots whose record lock is held, with the pid that holds it."""
    layout = "hhqqi4x"  # struct flock on x86-64 after native alignment
    start, end = OWNER_BYTE, OWNER_BYTE + 4097
    while start < end:
        ask = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
        kind, _, at, length, pid = struct.unpack(layout, fcntl.fcntl(table, fcntl.F_GETLK, ask))
        if kind == fcntl.F_UNLCK:
            return
        # F_GETLK tells one lock in the way, not always the first: look below it, too.
        if at > start:
            yield from _holders_below(table, start, at)
        for slot in range(at, at + length):
            yield slot - OWNER_BYTE, pid
        start = at + length


def _holders_below(table: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    layout = "hhqqi4x"
    for byte in range(start, end):
        ask = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(table, fcntl.F_GETLK, ask))
        if kind != fcntl.F_UNLCK:
            yield byte - OWNER_BYTE, pid


class _LockArgs(ctypes.Structure):
    _fields_ = (
        ("timeoutMs", ctypes.c_uint),
        ("reserved0", ctypes.c_uint),
        ("reserved1", ctypes.c_uint64 * 7),
    )


class _GpuPair(ctypes.Structure):
    _fields_ = (("old", ctypes.c_ubyte * 16), ("new", ctypes.c_ubyte * 16))


class _RestoreArgs(ctypes.Structure):
    _fields_ = (
        ("gpuPairs", ctypes.POINTER(_GpuPair)),
        ("gpuPairsCount", ctypes.c_uint),
        ("reserved", ctypes.c_char * 52),
    )


class Library:
    """The checkpoint calls of a libcuda, from this process. Each returns the CUDA error code."""

    def __init__(self, libcuda: Path) -> None:
        self._lib = ctypes.CDLL(str(libcuda))

    def state(self, pid: int) -> tuple[int, int]:
        """(error code, state); the state is -1 where there is an error."""
        state = ctypes.c_int(-1)
        code = int(self._lib.cuCheckpointProcessGetState(pid, ctypes.byref(state)))
        return code, state.value

    def restore_thread(self, pid: int) -> tuple[int, int]:
        tid = ctypes.c_int(-1)
        code = int(self._lib.cuCheckpointProcessGetRestoreThreadId(pid, ctypes.byref(tid)))
        return code, tid.value

    def lock(self, pid: int, timeout_ms: int = 0) -> int:
        args = _LockArgs(timeoutMs=timeout_ms)
        return int(self._lib.cuCheckpointProcessLock(pid, ctypes.byref(args)))

    def checkpoint(self, pid: int) -> int:
        return int(self._lib.cuCheckpointProcessCheckpoint(pid, None))

    def restore(self, pid: int, pairs: Sequence[tuple[uuid.UUID, uuid.UUID]] = ()) -> int:
        table = (_GpuPair * len(pairs))()
        for entry, (old, new) in zip(table, pairs, strict=True):
            entry.old[:] = old.bytes
            entry.new[:] = new.bytes
        args = _RestoreArgs(gpuPairs=table, gpuPairsCount=len(pairs))
        return int(self._lib.cuCheckpointProcessRestore(pid, ctypes.byref(args)))

    def unlock(self, pid: int) -> int:
        return int(self._lib.cuCheckpointProcessUnlock(pid, None))

    def token_of(self, pid: int) -> str:
        token = ctypes.create_string_buffer(33)
        code = self._lib.simgpuTokenOf(pid, token)
        if code != SUCCESS:
            raise OSError(f"process {pid} has no simulated CUDA (error {code})")
        return token.value.decode()


class Report(NamedTuple):
    """One line of the workload."""

    counter: int
    device: str
    cpu: str
    file: str
    ok: bool
    pid: int
    time: float
    tcp: bool
    flock: bool
    fcntl: bool
    name: str
    kind: str


def reports(status: Path) -> list[Report]:
    """All complete lines of one status file, oldest first; empty while there is none."""
    try:
        text = status.read_text()
    except FileNotFoundError:
        return []
    return [Report(**json.loads(line)) for line in text.splitlines(True) if line.endswith("\n")]
