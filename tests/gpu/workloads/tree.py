"""A CUDA process with children that use the GPU in part or not at all.

python tree.py loader-fork | loader-spawn | nvml | fork
    loader-*  a DataLoader with two workers, started in that way after CUDA is up
    nvml      a child process that asks NVML for the memory in use, and knows nothing of CUDA
    fork      a child forked after CUDA was initialised, which goes on without it
"""

import json
import os
import subprocess
import sys
import time

import torch

NVML = """
import ctypes, json, time
class Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]
nvml = ctypes.CDLL("libnvidia-ml.so.1")
assert nvml.nvmlInit_v2() == 0
handle, memory, counter = ctypes.c_void_p(), Memory(), 0
with open("/job/child", "a", buffering=1) as file:
    while True:
        counter += 1
        code = nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle))
        code = code or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
        line = {"counter": counter, "code": code, "used": memory.used, "time": time.time()}
        file.write(json.dumps(line) + "\\n")
        time.sleep(0.05)
"""


class Numbers(torch.utils.data.IterableDataset):
    def __iter__(self):
        worker = torch.utils.data.get_worker_info().id
        number = 0
        while True:
            number += 1
            yield torch.full((1000,), float(worker * 1_000_000 + number))


def report(path, values):
    counter = 0
    with open(path, "a", buffering=1) as file:
        for value in values:
            counter += 1
            line = {"counter": counter, "sum": value, "time": time.time()}
            file.write(json.dumps(line) + "\n")
            time.sleep(0.05)


def sums(tensor):
    while True:
        yield tensor.sum().item()


def main():
    kind = sys.argv[1]
    tensor = torch.ones(1024 * 1024, device="cuda")
    tensor.sum().item()
    if kind == "nvml":
        subprocess.Popen([sys.executable, "-c", NVML])
    elif kind == "fork" and os.fork() == 0:
        report("/job/child", sums(torch.ones(10)))
    if kind.startswith("loader"):
        start = kind.removeprefix("loader-")
        batches = torch.utils.data.DataLoader(
            Numbers(), batch_size=4, num_workers=2, multiprocessing_context=start
        )
        report("/job/status", (batch.to("cuda").sum().item() for batch in batches))
    else:
        report("/job/status", sums(tensor))


if __name__ == "__main__":
    main()
