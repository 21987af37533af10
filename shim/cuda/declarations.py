"""The C declarations of libcuda's checkpoint calls, and the generator of `_libcuda.py` from them.

Run `python -m shim.cuda.declarations` after a change; a test checks that the two are in step. They
are compiled ahead of time because parsing C at run time costs 40 ms, more than all the rest of a
`cuda-checkpoint` call. Layouts: CUDA driver API, group CUDA_CHECKPOINT (12.8; `gpu_pairs` and
`gpu_pairs_count` since 13.0, where 12.x has reserved bytes that must be zero). All argument
structures are 64 bytes. Names of types and fields are ours: only the layout is the driver's.
"""

from __future__ import annotations

import os

DECLARATIONS = """
typedef struct { unsigned int timeout_ms; unsigned int zero; uint64_t zeroes[7]; } lock_args;
typedef struct { uint64_t zeroes[8]; } checkpoint_args;
typedef struct { char old_uuid[16]; char new_uuid[16]; } gpu_pair;
typedef struct {
    gpu_pair *gpu_pairs; unsigned int gpu_pairs_count; char zeroes[44]; uint64_t zero;
} restore_args;
typedef struct { uint64_t zeroes[8]; } unlock_args;

int cuDriverGetVersion(int *version);
int cuGetErrorName(int code, const char **name);
int cuCheckpointProcessGetState(int pid, int *state);
int cuCheckpointProcessGetRestoreThreadId(int pid, int *tid);
int cuCheckpointProcessLock(int pid, lock_args *args);
int cuCheckpointProcessCheckpoint(int pid, checkpoint_args *args);
int cuCheckpointProcessRestore(int pid, restore_args *args);
int cuCheckpointProcessUnlock(int pid, unlock_args *args);
"""

GENERATED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_libcuda.py")
HEADER = """# Made by shim/cuda/declarations.py; do not edit.
# ruff: noqa
# fmt: off
# mypy: ignore-errors
"""


def generate(path: str) -> None:
    """Writes the compiled declarations to `path`."""
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    ffi.set_source("shim.cuda._libcuda", None)
    ffi.emit_python_code(path)  # says so on stdout
    with open(path, encoding="ascii") as file:
        text = file.read()
    with open(path, "w", encoding="ascii") as file:
        file.write(HEADER + text)


if __name__ == "__main__":
    generate(GENERATED)
