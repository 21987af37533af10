"""libcuda's checkpoint calls in this process: find the library, make a call, name its error.

For the helper process and our `cuda-checkpoint` only: a call about a process whose threads stand
still never returns, so the shim itself must never import this. `cuInit` is never called: the
checkpoint calls work without it (measured on r580) and it would open a context on every GPU.
"""

from __future__ import annotations

import os
from typing import Any

from shim.cuda import states
from shim.cuda._libcuda import ffi
from shim.cuda.errors import LibraryError

CALLS = (
    "cuCheckpointProcessGetState",
    "cuCheckpointProcessGetRestoreThreadId",
    "cuCheckpointProcessLock",
    "cuCheckpointProcessCheckpoint",
    "cuCheckpointProcessRestore",
    "cuCheckpointProcessUnlock",
)
NAME = "libcuda.so.1"
FIRST_DRIVER = "r570"  # the first with all of CALLS (CUDA 12.8)

# Tried after what the loader finds by itself: where a driver container keeps its libraries on the
# host (the GPU operator's root file system, of Ubuntu or of Red Hat; GKE's installer), and what a
# loader's cache may not know.
DIRECTORIES = (
    "/run/nvidia/driver/usr/lib/x86_64-linux-gnu",
    "/run/nvidia/driver/usr/lib/aarch64-linux-gnu",
    "/run/nvidia/driver/usr/lib64",
    "/home/kubernetes/bin/nvidia/lib64",
    "/usr/lib/x86_64-linux-gnu/nvidia/current",
    "/usr/lib64",
)


class LibCuda:
    """libcuda, loaded. Each method makes one driver call and returns (CUresult, value).

    `path` is what was loaded, `cuda_version` e.g. 13000 for 13.0, `missing` the checkpoint calls
    this driver does not have (empty from r570 on); calling one of those raises LibraryError.
    """

    def __init__(self, path: str = "") -> None:
        """Loads `path`, or searches where it is empty. Raises LibraryError."""
        self.path, self._lib = _load(path)
        version = ffi.new("int *")
        self.cuda_version: int = version[0] if self._lib.cuDriverGetVersion(version) == 0 else 0
        self.missing = tuple(name for name in CALLS if not _has(self._lib, name))

    def error_name(self, code: int) -> str:
        """The driver's own name for a CUresult."""
        text: Any = ffi.new("char **")
        if self._lib.cuGetErrorName(code, text) != states.SUCCESS or text[0] == ffi.NULL:
            return states.error_name(code)
        name: Any = ffi.string(text[0])
        return str(name.decode())

    def state(self, pid: int) -> tuple[int, int]:
        """The process's CUprocessState; (3, 0) where it has no CUDA."""
        value = ffi.new("int *")
        return self._call("cuCheckpointProcessGetState", pid, value), value[0]

    def restore_tid(self, pid: int) -> tuple[int, int]:
        """The thread that does the driver's work inside the process."""
        value = ffi.new("int *")
        return self._call("cuCheckpointProcessGetRestoreThreadId", pid, value), value[0]

    def lock(self, pid: int, timeout_ms: int) -> tuple[int, int]:
        """running -> locked; waits up to `timeout_ms` (0: for ever) for work in flight."""
        args = ffi.new("lock_args *", {"timeout_ms": timeout_ms})
        return self._call("cuCheckpointProcessLock", pid, args), 0

    def checkpoint(self, pid: int) -> tuple[int, int]:
        """locked -> checkpointed; device memory goes into memory of the process."""
        return self._call("cuCheckpointProcessCheckpoint", pid, ffi.new("checkpoint_args *")), 0

    def restore(self, pid: int, device_map: str = "") -> tuple[int, int]:
        """checkpointed -> locked. `device_map` is "old=new,..." of GPU UUIDs and must then name
        every GPU of the process. Raises LibraryError where the driver cannot map."""
        pairs = parse_device_map(device_map)
        if pairs and self.cuda_version < states.DEVICE_MAP_CUDA:
            raise LibraryError(
                f"a device map needs a driver with CUDA 13.0 (r580) or later; {self.path} has "
                f"CUDA {version_text(self.cuda_version)}"
            )
        array = ffi.new("gpu_pair[]", [{"old_uuid": old, "new_uuid": new} for old, new in pairs])
        args: Any = ffi.new("restore_args *")
        if pairs:
            args.gpu_pairs = array
            args.gpu_pairs_count = len(pairs)
        return self._call("cuCheckpointProcessRestore", pid, args), 0

    def unlock(self, pid: int) -> tuple[int, int]:
        """locked -> running."""
        return self._call("cuCheckpointProcessUnlock", pid, ffi.new("unlock_args *")), 0

    def _call(self, name: str, pid: int, args: object) -> int:
        if name in self.missing:
            raise LibraryError(missing_text(self.path, self.cuda_version, (name,)))
        return int(getattr(self._lib, name)(pid, args))


def _load(path: str) -> tuple[str, Any]:
    if path:
        try:
            return path, ffi.dlopen(path)
        except OSError as error:
            raise LibraryError(f"the configured libcuda cannot be loaded: {error}") from error
    tried = []
    places = [os.path.join(directory, NAME) for directory in DIRECTORIES]
    for candidate in (NAME, *filter(os.path.exists, places)):
        try:
            return candidate, ffi.dlopen(candidate)
        except OSError as error:
            tried.append(str(error))
    raise LibraryError(
        f"no {NAME} on this node ({'; '.join(tried)}; looked for in the loader's path and in "
        f"{', '.join(DIRECTORIES)}): is the NVIDIA driver installed? If it is elsewhere, name the "
        "library as `libcuda` under [grit]"
    )


def _has(library: Any, name: str) -> bool:
    try:
        getattr(library, name)
    except (AttributeError, ffi.error):
        return False
    return True


def version_text(cuda_version: int) -> str:
    """12080 -> "12.8"."""
    return f"{cuda_version // 1000}.{cuda_version % 1000 // 10}"


def missing_text(path: str, cuda_version: int, missing: tuple[str, ...]) -> str:
    """Why this driver cannot be used, and which can."""
    return (
        f"{path} (CUDA {version_text(cuda_version)}) lacks {', '.join(missing)}: these calls came "
        f"with driver {FIRST_DRIVER}"
    )


def parse_device_map(text: str) -> list[tuple[bytes, bytes]]:
    """ "GPU-<uuid>=GPU-<uuid>,..." as (old, new) of 16 bytes each. Raises LibraryError."""
    pairs = []
    for pair in filter(None, text.split(",")):
        old, _, new = pair.partition("=")
        try:
            pairs.append((_uuid(old), _uuid(new)))
        except ValueError as error:
            raise LibraryError(
                f"device map: {pair!r} is not OLD=NEW with two GPU UUIDs: {error}"
            ) from error
    return pairs


def _uuid(text: str) -> bytes:
    raw = bytes.fromhex(text.strip().removeprefix("GPU-").replace("-", ""))
    if len(raw) != 16:
        raise ValueError(f"{text!r} has {len(raw)} bytes, not 16")
    return raw
