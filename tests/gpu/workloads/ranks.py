"""Processes that hold device memory each, as the ranks of a training have: one for each GPU and one
more, so that a GPU has two of them, and the first also holds some on every GPU.

python ranks.py MEGABYTES

Reports of the first go to `status`, of the others to `rank-N`.
"""

import json
import os
import subprocess
import sys
import time

import torch

megabytes = int(sys.argv[1])
rank = int(sys.argv[2]) if len(sys.argv) > 2 else 0
count = torch.cuda.device_count()
if not rank:
    for one in range(1, count + 1):
        subprocess.Popen([sys.executable, "-u", __file__, str(megabytes), str(one)])
torch.manual_seed(rank)
ballast = [
    torch.full((megabytes, 1024 * 1024 // 4), 1.5 + rank, device=f"cuda:{device}")
    for device in (range(count) if not rank else [rank % count])
]
tensor = torch.randn(1024 * 1024, device=ballast[0].device)
marker = torch.randn(1000)
counter = 0
with open(f"/job/rank-{rank}" if rank else "/job/status", "a", buffering=1) as file:
    while True:
        counter += 1
        line = {
            "counter": counter,
            "sum": tensor.sum().item(),
            "ballast": sum(part.sum().item() for part in ballast),
            "cpu": marker.sum().item(),
            "gpus": count,
            "pid": os.getpid(),
            "time": time.time(),
        }
        file.write(json.dumps(line) + "\n")
        time.sleep(0.02)
