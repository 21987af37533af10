"""What runs inside a node for test_real_criu.py: one dump through the bridge, told as JSON.

    python3 in_node.py ORDER      ORDER is JSON, see `main`; the answer is one JSON line

It is no test and imports nothing but the bridge and the standard library: the node's own
python3 runs it, with the repository bound at ROOT.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

ROOT = "/grit"
sys.path.insert(0, ROOT)

from shim import runcstate  # noqa: E402
from shim.criu_bridge import client, freezer, images, request, transport  # noqa: E402
from shim.criu_bridge.errors import CriuError  # noqa: E402

LIBC = ctypes.CDLL(None, use_errno=True)


def main(order: dict[str, Any]) -> dict[str, Any]:
    """`id`, `images`, `work`; `options` of DumpOptions; `service`: path of a service's socket;
    `env` for CRIU; `tmpfs`: lay a tmpfs of that size over `images`; `deadline`; and what to do at the notification `at`: "refuse", "cancel",
    "kill" (CRIU, SIGKILL), "raise" or "hang" until CRIU is gone."""
    state = runcstate.load(runcstate.DEFAULT_ROOT, "default", order["id"])
    env = {**os.environ, **order.get("env", {})}
    criu: transport.Swrk | transport.Service = transport.Swrk("criu", env)
    if "service" in order:
        criu = transport.Service(order["service"])
    os.makedirs(order["images"], mode=0o700, exist_ok=True)
    os.makedirs(order["work"], mode=0o700, exist_ok=True)
    if "tmpfs" in order:
        mount_tmpfs(order["images"], order["tmpfs"])
    options = request.dump_options(state, request.DumpOptions(**order.get("options", {})))
    request.write_descriptors(state, order["images"])
    cancel = transport.Cancel()

    def on_notify(name: str) -> bool:
        if name != order.get("at"):
            return True
        action = order["do"]
        if action == "cancel":
            cancel.cancel()
        elif action == "kill":
            kill_criu()
        elif action == "raise":
            raise RuntimeError("no room for this dump")
        return action != "refuse"

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


def kill_criu() -> None:
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
        for pid in children.read().split():
            os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
