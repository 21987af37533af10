"""`python -m tests.demo`: the demo, top to bottom. The exit status is 0 only if all that it claims
was seen. Whatever happens, also Ctrl-C, nothing of it is left on the machine but the cache."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from tests.demo import stage
from tests.demo.images import Images
from tests.demo.screen import Screen, mebibytes
from tests.e2e.gpu import STOCK, Job, until

if TYPE_CHECKING:
    from tests.nodes.node import Node
    from tests.simgpu.simgpu import Report, SimGpu

REFERENCE = "docker.io/demo/saved:1"
BUNDLE = "/run/containerd/io.containerd.runtime.v2.task/default"


class Untrue(Exception):
    """Something the demo claims is not so."""


def main() -> int:
    if os.geteuid() != 0:
        print("the demo starts a containerd: run it as root", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _interrupted)
    screen = Screen()
    print("containerd-shim-grit: a GPU container checkpointed by stock containerd, and restored")
    print()
    node = stage.make()
    began = time.monotonic()
    try:
        try:
            show(screen, node)
        finally:
            node.close()
        with screen.phase("nothing left behind on this machine"):
            left = stage.left_on_host(node.identity)
            require(not left, f"left behind: {left}")
    except KeyboardInterrupt:
        print("\ninterrupted; the node is gone with all that was in it")
        return 130
    except Exception as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print(f"\nAll of it true, in {time.monotonic() - began:.0f} s.")
    return 0


def show(screen: Screen, node: Node) -> None:
    with screen.phase("a Debian 13 node with its own containerd, and grit installed"):
        node.start()
        board = stage.furnish(node)
        empty = node.leaks()
        parts = stage.parts(node)
    screen.note(parts)
    real = " (this machine has a real one: docs/gpu.md)" if os.path.exists("/dev/nvidiactl") else ""
    screen.note(
        f"The GPU is simulated{real}: a libcuda.so.1 with the driver's checkpoint calls, device "
        "memory outside the process, and an answer only while the process runs."
    )
    print()
    stock_path(screen, node, board)
    grit_path(screen, node, board)
    with screen.phase("nothing left behind on the node"):
        until("an end without leaks", lambda: not node.leaks() - empty, 10)
        require(not board.owners(), "device memory is still held")


def stock_path(screen: Screen, node: Node, board: SimGpu) -> None:
    """What happens without grit."""
    with screen.phase("ctr run --runtime io.containerd.runc.v2: a GPU job, stock shim"):
        job = Job(node, board, "stock", *stage.WORDS, runtime=STOCK).run()
    with screen.phase("ctr task checkpoint, with CRIU's CUDA plugin in place"):
        done = job.ctr("task", "checkpoint", job.name, check=False)
    require(done.returncode != 0, "the stock path worked: this containerd and CRIU need no demo")
    log = node.path(f"{BUNDLE}/{job.name}/criu-dump.log").read_text()
    screen.note(f"refused, exit status {done.returncode}. From CRIU's log:")
    told = re.compile(r"Timeout reached|cuda_plugin: Failed|Dumping FAILED")
    screen.verbatim([line for line in log.splitlines() if told.search(line)])
    screen.note(
        "Why: containerd has the container frozen (Pause) before it is dumped (Checkpoint). The "
        "driver's answers come from a thread of the process itself, and that is frozen too. CRIU's "
        "plugin asks it, waits for 10 s, and gives up."
    )
    job.end()
    print()


def grit_path(screen: Screen, node: Node, board: SimGpu) -> None:
    """The same job, node and CRIU, under grit."""
    with screen.phase("ctr run --runtime io.containerd.grit.v1: the same job, under grit"):
        job = Job(node, board, "job", *stage.WORDS).run()
        start = job.next_report()
    screen.note(f"{_said(start)}; holds {mebibytes(board.owners()[job.pid()])} on the GPU")

    with screen.phase("ctr task checkpoint: the job runs on"):
        job.ctr("task", "checkpoint", job.name)
        live = job.next_report()
        compare(start, live)
    screen.note(f"{_said(live)}; the device memory is the same")

    with screen.phase("ctr container checkpoint --rw --task: the image to restore from"):
        before = job.next_report()
        job.checkpoint_container(REFERENCE)
        compare(before, job.next_report())
    with screen.phase("ctr task kill, ctr container delete: the job is gone"):
        job.end()
        require(job.status() == "" and not board.owners(), "the job still holds device memory")
    with screen.phase("ctr container restore --live --rw: the job is back"):
        job.restore_container(REFERENCE)
        until("the job's GPU", lambda: job.pid() in board.owners())
        after = job.next_report()
        compare(before, after)
    with screen.phase("a look into the image"):
        images = Images(node, REFERENCE)
        manifest = images.manifest()
        (process,) = manifest["cuda_processes"]
        place = images.region(process["inner"][-1], *process["region"])
        inside = stage.digest(images.bytes_at(place))
        require(inside == after.device, "the image holds other device memory than the job")
    print()

    sizes = images.sizes()
    rows = [("file", "size", "")]
    notes = {
        place.name: f"GPU memory: {mebibytes(place.size)} from byte {place.offset} on",
        "grit.json": "the manifest: checksums, GPU processes, times",
    }
    biggest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:4]
    shown = [*biggest, *(name for name in notes if name not in biggest)]
    rows += [(name, f"{sizes[name]:,}", notes.get(name, "")) for name in shown]
    rest = [size for name, size in sizes.items() if name not in shown]
    rows.append((f"{len(rest)} more", f"{sum(rest):,}", "the rest of CRIU's images"))
    screen.table(rows)

    phases = [(name, f"{seconds:.2f} s") for name, seconds in manifest["phases"].items()]
    screen.table([("phase", "time"), *phases])

    screen.table(
        [
            ("", "before checkpoint", "after restore", "in the image"),
            ("counter", str(before.counter), str(after.counter), ""),
            ("digest of device memory", before.device, after.device, inside),
            ("digest of CPU memory", before.cpu, after.cpu, ""),
            ("digest of its file", before.file, after.file, ""),
        ]
    )
    job.end()
    job.remove_checkpoints()


def compare(before: Report, after: Report) -> None:
    """The same job, further on. Raises Untrue."""
    for what, name in {"device": "device memory", "cpu": "CPU memory", "file": "file"}.items():
        old, new = getattr(before, what), getattr(after, what)
        require(old == new, f"the digest of the job's {name} was {old} and is {new}")
    require(after.counter > before.counter, f"the counter stands at {after.counter}")
    require(after.ok, f"the job says that something of it is lost: {after}")


def require(true: bool, otherwise: str) -> None:
    if not true:
        raise Untrue(otherwise)


def _said(report: Report) -> str:
    return f"counter {report.counter}, digest of the device memory {report.device}"


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
