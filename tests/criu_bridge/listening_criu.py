"""Stands in for `criu` under the real runc: says it is CRIU 4.1.1, writes down the dump request
it gets (as $REQUEST, the raw message) and refuses it. Runs inside a node."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

sys.path.insert(0, "/grit")

from shim.criu_bridge import rpc

connection = socket.socket(fileno=int(sys.argv[2]))
raw = connection.recv(1 << 20)
request = rpc.CriuReq.decode(raw)
if request.type == rpc.VERSION:
    version = rpc.Version(major_number=4, minor_number=1, sublevel=1)
    answer = rpc.CriuResp(type=rpc.VERSION, success=True, version=version)
else:
    Path(os.environ["REQUEST"]).write_bytes(raw)
    answer = rpc.CriuResp(type=rpc.DUMP, success=False)
connection.send(answer.encode())
