"""The seed's job: PyTorch holds a tensor on the GPU and says its sum again and again.

python hold.py MEGABYTES        (that much more device memory, all of one pattern)
"""

import json
import os
import sys
import time

import torch

megabytes = int(sys.argv[1])
torch.manual_seed(7)
tensor = torch.randn(1024 * 1024, device="cuda")
ballast = torch.full((megabytes, 1024 * 1024 // 4), 1.5, device="cuda")
marker = torch.randn(1000)
counter = 0
with open("/job/status", "a", buffering=1) as file:
    while True:
        counter += 1
        line = {
            "counter": counter,
            "sum": tensor.sum().item(),
            "ballast": ballast.sum().item(),
            "cpu": marker.sum().item(),
            "pid": os.getpid(),
            "time": time.time(),
        }
        file.write(json.dumps(line) + "\n")
        time.sleep(0.02)
