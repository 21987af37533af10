"""The C declarations of the library calls that we use, NVIDIA's and the system's, and the generator
of `_libcuda.py`, `_libnvml.py`, `_ptrace.py`, `_memory.py` and `_codec.py` from them.

Run `python -m shim.cuda.declarations` after a change; a test checks that they are in step. They
are compiled ahead of time because parsing C at run time costs 40 ms, more than all the rest of a
`cuda-checkpoint` call. Names of types and fields are ours: only the layout is the driver's.
"""

from __future__ import annotations

import os

# CUDA driver API, group CUDA_CHECKPOINT (12.8; `gpu_pairs` and `gpu_pairs_count` since 13.0, where
# 12.x has reserved bytes that must be zero). All argument structures are 64 bytes.
CUDA = """
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

# NVML API reference, nvmlProcessInfo_t as _v3 of the call takes it (r510 and later). A device
# handle is an opaque pointer.
NVML = """
typedef struct {
    unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance;
} process_memory;
typedef struct { unsigned long long total, free, used; } device_memory;

int nvmlInit_v2(void);
int nvmlShutdown(void);
const char *nvmlErrorString(int code);
int nvmlDeviceGetCount_v2(unsigned int *count);
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device);
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length);
int nvmlDeviceGetMemoryInfo(void *device, device_memory *memory);
int nvmlDeviceGetMigMode(void *device, unsigned int *now, unsigned int *after_reset);
int nvmlDeviceGetComputeRunningProcesses_v3(
    void *device, unsigned int *count, process_memory *processes);
int nvmlDeviceGetMPSComputeRunningProcesses_v3(
    void *device, unsigned int *count, process_memory *processes);
"""

# linux/ptrace.h, linux/uio.h, and the registers of asm/user_64.h (x86-64). The C library's ptrace
# takes its arguments as any function does there.
PTRACE = """
typedef struct {
    uint64_t r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip,
        cs, eflags, rsp, ss, fs_base, gs_base, ds, es, fs, gs;
} user_registers;
typedef struct { void *base; size_t size; } io_vector;

long ptrace(long request, int pid, void *address, void *data);
"""

# linux/uio.h; process_vm_readv(2), sync_file_range(2). A process's address is a number here: it is
# none of ours.
MEMORY = """
typedef struct { void *base; size_t size; } our_span;
typedef struct { uintptr_t base; size_t size; } their_span;

ssize_t process_vm_readv(
    int pid, our_span *ours, unsigned long count, their_span *theirs, unsigned long their_count,
    unsigned long flags);
ssize_t process_vm_writev(
    int pid, our_span *ours, unsigned long count, their_span *theirs, unsigned long their_count,
    unsigned long flags);
int memcmp(const void *one, const void *other, size_t size);
int sync_file_range(int fd, int64_t offset, int64_t size, unsigned int flags);
"""

# lz4.h, zstd.h: what has been in them since their first stable versions.
CODEC = """
int LZ4_compress_default(const char *source, char *target, int size, int room);
int LZ4_decompress_safe(const char *source, char *target, int size, int room);

typedef struct compression compression;
typedef struct decompression decompression;
compression *ZSTD_createCCtx(void);
size_t ZSTD_freeCCtx(compression *context);
size_t ZSTD_compressCCtx(
    compression *context, void *target, size_t room, const void *source, size_t size, int level);
decompression *ZSTD_createDCtx(void);
size_t ZSTD_freeDCtx(decompression *context);
size_t ZSTD_decompressDCtx(
    decompression *context, void *target, size_t room, const void *source, size_t size);
unsigned int ZSTD_isError(size_t code);
"""

MODULES = {
    "_libcuda": CUDA,
    "_libnvml": NVML,
    "_ptrace": PTRACE,
    "_memory": MEMORY,
    "_codec": CODEC,
}
DIRECTORY = os.path.dirname(os.path.abspath(__file__))
HEADER = """# Made by shim/cuda/declarations.py; do not edit.
# ruff: noqa
# fmt: off
# mypy: ignore-errors
"""


def generate(module: str, directory: str) -> None:
    """Writes the compiled declarations of one of MODULES into `directory`."""
    from cffi import FFI

    path = os.path.join(directory, f"{module}.py")
    ffi = FFI()
    ffi.cdef(MODULES[module])
    ffi.set_source(f"shim.cuda.{module}", None)
    ffi.emit_python_code(path)  # says so on stdout
    with open(path, encoding="ascii") as file:
        text = file.read()
    with open(path, "w", encoding="ascii") as file:
        file.write(HEADER + text)


if __name__ == "__main__":
    for name in MODULES:
        generate(name, DIRECTORY)
