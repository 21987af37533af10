"""Trains a small model, deterministically, and says the loss of every step, bit for bit.

python train.py STATUS_FILE SECONDS_BETWEEN_STEPS [STEPS]
"""

import json
import os
import sys
import time

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

import torch

status, nap, steps = sys.argv[1], float(sys.argv[2]), int([*sys.argv, "0"][3])
torch.use_deterministic_algorithms(True)
torch.manual_seed(11)
device = torch.device("cuda")
model = torch.nn.Sequential(
    torch.nn.Linear(64, 512),
    torch.nn.GELU(),
    torch.nn.Dropout(0.2),
    torch.nn.Linear(512, 512),
    torch.nn.GELU(),
    torch.nn.Linear(512, 8),
).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
teacher = torch.randn(64, 8, device=device)
step = 0
with open(status, "a", buffering=1) as file:
    while not steps or step < steps:
        step += 1
        batch = torch.randn(256, 64, device=device)
        loss = torch.nn.functional.mse_loss(model(batch), torch.tanh(batch @ teacher))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        line = {"counter": step, "loss": loss.item().hex(), "time": time.time()}
        file.write(json.dumps(line) + "\n")
        time.sleep(nap)
