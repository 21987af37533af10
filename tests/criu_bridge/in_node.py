"""What runs inside a node for test_real_criu.py: one dump through the bridge, told as JSON.

    python3 in_node.py ORDER      ORDER is JSON, see `main`; the answer is one JSON line

It is no test and imports nothing but the bridge and the standard library: the node's own
python3 runs it, with the repository bound at ROOT.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

ROOT = "/grit"
sys.path.insert(0, ROOT)

from shim import runcstate  # noqa: E402
from shim.criu_bridge import client, config, freezer, images, request, transport  # noqa: E402
from shim.criu_bridge.errors import CriuError  # noqa: E402

LIBC = ctypes.CDLL(None, use_errno=True)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


def main(order: dict[str, Any]) -> dict[str, Any]:
    """`id`, `images`, `work`; `options` of DumpOptions; `service`: path of a service's socket;
    `environment` of config.environment, then `env` for CRIU; `tmpfs`: lay a tmpfs of that size
    over `images`; `deadline` and `grace` in seconds; and what to do (`do`) at the notification
    `at`, or "pages" while pages are being written: "refuse", "raise", "cancel", "kill" (CRIU,
    SIGKILL) or "stop" (CRIU, SIGSTOP)."""
    state = runcstate.load(runcstate.DEFAULT_ROOT, "default", order["id"])
    env = {**config.environment(**order.get("environment", {})), **order.get("env", {})}
    criu: transport.Swrk | transport.Service = transport.Swrk("criu", env)
    if "service" in order:
        criu = transport.Service(order["service"])
    os.makedirs(order["images"], mode=0o700, exist_ok=True)
    os.makedirs(order["work"], mode=0o700, exist_ok=True)
    if "tmpfs" in order:
        mount_tmpfs(order["images"], order["tmpfs"])
    options = request.dump_options(state, request.DumpOptions(**order.get("options", {})))
    request.write_descriptors(state, order["images"])
    client.GRACE_S = order.get("grace", client.GRACE_S)
    cancel = transport.Cancel()

    def act() -> None:
        if order["do"] == "cancel":
            cancel.cancel()
        elif order["do"] == "raise":
            raise RuntimeError("no room for this dump")
        elif order["do"] in SIGNALS:
            signal_criu(SIGNALS[order["do"]])

    def on_notify(name: str) -> bool:
        if name != order.get("at"):
            return True
        act()
        return bool(order["do"] != "refuse")

    if order.get("at") == "pages":
        threading.Thread(target=when_pages_flow, args=(order["images"], act), daemon=True).start()

    cgroup = state.freezer_path
    assert cgroup is not None
    answer: dict[str, Any] = {"before": freezer.state(cgroup), "pid": state.init_process_pid}
    try:
        result = client.dump(
            criu,
            options,
            order["images"],
            order["work"],
            on_notify=on_notify,
            deadline_s=order.get("deadline", 60),
            cancel=cancel,
        )
        answer["notifications"] = [name for name, _ in result.notifications]
        answer["plugins"] = images.plugins(order["images"])
        answer["processes"] = [item.pid for item in images.processes(order["images"])]
        answer["stats"] = images.dump_stats(order["work"]).pages_written
        answer["page_bytes"] = images.sizes(order["images"]).page_bytes
    except CriuError as error:
        answer["error"] = str(error)
        answer["died"] = error.died
        answer["refrozen"] = error.refrozen
        answer["first_error"] = error.first_error
    if "tmpfs" in order:
        LIBC.umount2(order["images"].encode(), 0)
    answer["after"] = freezer.state(cgroup)
    return answer


def mount_tmpfs(path: str, size: str) -> None:
    done = LIBC.mount(b"tmpfs", path.encode(), b"tmpfs", 0, f"size={size}".encode())
    assert done == 0, os.strerror(ctypes.get_errno())


def when_pages_flow(directory: str, act: Callable[[], None]) -> None:
    """Once CRIU has written the first megabytes of memory, with many more to come."""
    while True:
        with contextlib.suppress(images.ImageError):
            if images.sizes(directory).page_bytes > 16 << 20:
                return act()


def signal_criu(number: int) -> None:
    for children in glob.glob("/proc/self/task/*/children"):
        with open(children, encoding="ascii") as file:
            for pid in file.read().split():
                os.kill(int(pid), number)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
