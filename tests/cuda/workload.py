"""A process that uses the simulated GPU at a test's word. Run as a program: argv[1] is libcuda;
each line on stdin is a command, answered by one line. The wanted calls are few, so ctypes does."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys

held: list[tuple[ctypes.c_uint64, int]] = []


def check(code: int) -> None:
    if code:
        raise SystemExit(f"CUDA call failed: {code}")


def command(cuda: ctypes.CDLL, word: str, argument: int) -> object:
    match word:
        case "init":
            check(cuda.cuInit(0))
            context = ctypes.c_void_p()
            check(cuda.cuCtxCreate_v2(ctypes.byref(context), 0, 0))
        case "hold":  # so many bytes of device memory, filled
            pointer = ctypes.c_uint64()
            check(cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(argument)))
            data = os.urandom(argument)
            check(cuda.cuMemcpyHtoD_v2(pointer, data, ctypes.c_size_t(argument)))
            held.append((pointer, argument))
        case "digest":
            digest = hashlib.sha256()
            for pointer, size in held:
                copy = ctypes.create_string_buffer(size)
                check(cuda.cuMemcpyDtoH_v2(copy, pointer, ctypes.c_size_t(size)))
                digest.update(copy.raw)
            return digest.hexdigest()
        case "busy":  # milliseconds of work in flight
            check(cuda.simgpuLaunchBusy(argument))
        case "fork":
            child = os.fork()
            if child == 0:
                signal.pause()
            return child
        case "spawn":  # another workload that has initialised CUDA
            return os.spawnv(
                os.P_NOWAIT, sys.executable, [sys.executable, __file__, sys.argv[1], "init"]
            )
    return "ok"


def main() -> None:
    cuda = ctypes.CDLL(sys.argv[1])
    if sys.argv[2:] == ["init"]:
        command(cuda, "init", 0)
        signal.pause()
    print("ready", flush=True)
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        print(command(cuda, word, int(argument or 0)), flush=True)


if __name__ == "__main__":
    main()
