"""A `criu` that does what its test says, to try the other end of the conversation.

It is started as `criu swrk 3`, reads one request, looks around, and plays the steps listed in
$FAKE_CRIU (JSON): {"notify": NAME}, {"answer": BOOL}, {"raw": HEX}, {"exit": N}, {"kill": N},
{"hang": true}, {"leave": true} (a child that sleeps for ever), {"write": PATH} (a file that grows
until a write fails, then answers false).
What it saw goes into $FAKE_CRIU_SAW.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from shim.criu_bridge import rpc


def main() -> None:
    # Before anything else is opened.
    fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    connection = socket.socket(fileno=int(sys.argv[2]))
    request = rpc.CriuReq.decode(connection.recv(1 << 20))
    saw: dict[str, Any] = {
        "argv": sys.argv[1:],
        "fds": fds[:-1],  # the last one was the listing itself
        "links": [os.readlink(f"/proc/self/fd/{fd}") for fd in (0, 1, 2)],
        "session": os.getsid(0) == os.getpid(),
        "ignored": [int(s) for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN],
        "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "type": request.type,
        "replies": [],
    }
    opts = request.opts
    if opts is not None:
        link = f"/proc/{os.getppid()}/fd/{opts.images_dir_fd}"
        saw["images"] = os.readlink(link)
        Path(os.readlink(f"/proc/{os.getppid()}/fd/{opts.work_dir_fd}"), "dump.log").write_text(
            os.environ.get("FAKE_CRIU_LOG", "")
        )
    tell(saw)
    for step in json.loads(os.environ["FAKE_CRIU"]):
        if "notify" in step:
            notify = rpc.CriuResp(
                type=rpc.NOTIFY, success=True, notify=rpc.Notify(script=step["notify"])
            )
            connection.send(notify.encode())
            reply = rpc.CriuReq.decode(connection.recv(1 << 20))
            saw["replies"].append([step["notify"], reply.type, reply.notify_success])
            tell(saw)
            if not reply.notify_success:
                connection.send(rpc.CriuResp(type=rpc.DUMP, success=False).encode())
        elif "answer" in step:
            answer = rpc.CriuResp(type=rpc.DUMP, success=step["answer"], cr_errno=step.get("errno"))
            connection.send(answer.encode())
        elif "raw" in step:
            connection.send(bytes.fromhex(step["raw"]))
        elif "exit" in step:
            os._exit(step["exit"])
        elif "kill" in step:
            os.kill(os.getpid(), step["kill"])
        elif "hang" in step:
            signal.pause()
        elif "leave" in step:
            saw["left"] = os.fork()
            if not saw["left"]:
                signal.pause()
            tell(saw)
        elif "write" in step:
            with open(step["write"], "wb", buffering=0) as file:
                connection.send(
                    rpc.CriuResp(
                        type=rpc.NOTIFY, success=True, notify=rpc.Notify(script="writing")
                    ).encode()
                )
                connection.recv(1 << 20)
                try:
                    while True:
                        file.write(b"x")
                        file.seek(0)
                except OSError as error:
                    answer = rpc.CriuResp(type=rpc.DUMP, success=False, cr_errno=error.errno)
                    connection.send(answer.encode())


def tell(saw: dict[str, Any]) -> None:
    # A CRIU that was stopped cannot write any more.
    with contextlib.suppress(OSError):
        Path(os.environ["FAKE_CRIU_SAW"]).write_text(json.dumps(saw))
