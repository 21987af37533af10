"""Keeps the GPU in a kernel that runs for seconds, then leaves it alone for a while, and so on;
says at every report which of the two follows.

python busy.py SECONDS_PER_KERNEL
"""

import json
import sys
import time

import torch


def spin(cycles):
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize()


seconds = float(sys.argv[1])
spin(10_000_000)  # CUDA comes up
begun = time.time()
spin(1_000_000_000)
cycles = int(1_000_000_000 / (time.time() - begun) * seconds)
counter = 0
with open("/job/status", "a", buffering=1) as file:

    def report(follows):
        global counter
        counter += 1
        line = {"counter": counter, "follows": follows, "time": time.time()}
        file.write(json.dumps(line) + "\n")

    while True:
        report("kernel")
        spin(cycles)
        for _ in range(40):
            report("idle")
            time.sleep(0.1)
