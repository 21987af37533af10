"""`python -m tests.bench.migrate`: how fast TLS carries a checkpoint over the loopback, by the
number of streams; and how long a container stands still that moves between two nodes of this
machine, beside a checkpoint, the same sending and a restore one after the other, and beside a
checkpoint, `cp` and a restore. The ways take turns. All is in memory. Figures are for reading.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from shim import checkpoint_dir, digests
from shim.checkpoint_dir import Draft
from shim.gritctl import progress, tls, wire
from shim.gritctl.interrupts import Interrupts
from shim.gritctl.migrate import _dialled
from shim.gritctl.receive import Receiver
from shim.gritctl.sending import Sending
from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.gritctl.certificates import authority, certificate
from tests.nodes.installed import ENVIRONMENT
from tests.test_checkpoint_dir import a_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from shim.gritctl.wire import Connection
    from tests.nodes.node import Node

    Way = Callable[[Node, Node], dict[str, float]]

GIB = 1 << 30
PLACE = "/var/lib/checkpoints"
KEYS = "/etc/grit-keys"
HERE, THERE, PORT = "10.98.0.1", "10.98.0.2", 7433
_HOUR = "3600000"


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.bench.migrate", description=__doc__)
    parser.add_argument("--gib", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--checksum", choices=[digests.XXH3, digests.SHA256], default=digests.XXH3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--without-nodes", action="store_true")
    parser.add_argument("--ways", nargs="*", choices=_WAYS, default=_WAYS)
    parser.add_argument("--gbit", type=float, default=0, help="of the wire; unlimited if 0")
    parser.add_argument("--kinds", nargs="*", choices=_KINDS, default=_KINDS)
    options = parser.parse_args()
    if options.serve:
        return serve(Path(options.serve))
    size = int(options.gib * GIB)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as top:
        over_the_loopback(Path(top), size, options.streams, options.rounds, options.checksum)
    if not options.without_nodes:
        between_nodes(size, options)
    return None


def over_the_loopback(top: Path, size: int, streams: list[int], rounds: int, checksum: str) -> None:
    authority(top)
    certificate(top, "localhost")
    checkpoint = made(top / "here", size, checksum)
    for count in [one for one in streams for _ in range(rounds)]:
        (top / "there").mkdir(mode=0o700)
        command = [sys.executable, "-m", "tests.bench.migrate", "--serve", str(top)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            port = int(server.stdout.readline())
            context = keys(top, server=False)
            sender = Sending(
                *connected(port, context, count, checksum), progress.Display(), "one", "there", 600
            )
            began = time.monotonic()
            sender.follow(str(checkpoint))
            display = sender._display = Seconds()
            sender.deliver(lambda: None)
            took = display.seconds
            whole = time.monotonic() - began
            sender.close()
            server.terminate()
        shutil.rmtree(top / "there")
        print(
            f"{count} streams: {sender.bytes / GIB:.1f} GiB sent at "
            f"{sender.bytes / (whole - took['verify'] - took['restore']) / 1e9:.2f} GB/s, "
            f"verified in {took['verify']:.2f} s",
            flush=True,
        )


class Seconds(progress.Display):
    """By phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def ended(self, phase: progress.Phase, *, ok: bool) -> None:
        self.seconds[phase.name] = phase.seconds


def keys(top: Path, *, server: bool) -> ssl.SSLContext:
    files = [str(top / name) for name in ("localhost.crt", "localhost.key", "ca.crt")]
    return tls.context(*files, server=server)


def made(directory: Path, size: int, checksum: str) -> Path:
    draft = Draft.begin(str(directory))
    images = Draft.begin(os.path.join(draft.path, checkpoint_dir.IMAGES))
    Path(images.path, "inventory.img").write_bytes(b"inventory")
    piece = os.urandom(16 << 20)
    with open(os.path.join(images.path, "pages-1.img"), "wb") as file:
        for _ in range(size // len(piece)):
            file.write(piece)
    images.publish(a_manifest(), algorithm=checksum)
    Path(draft.path, checkpoint_dir.CONFIG_DUMP).write_text("{}")
    draft.publish_whole()
    return directory


def connected(
    port: int, context: ssl.SSLContext, streams: int, checksum: str
) -> tuple[Connection, list[Connection]]:
    id_ = os.urandom(16).hex()
    control = _dialled("localhost", port, context)
    facts: dict[str, Any] = {"id": id_, "name": "one", "room": 0, "version": wire.VERSION}
    control.send("begin", **facts, image="", snapshotter="", parent="", checksum=checksum, key="")
    control.expect("ready")
    opened = [_dialled("localhost", port, context) for _ in range(streams)]
    for one in opened:
        one.send("join", id=id_)
        one.expect("ready")
    return control, opened


class _Nothing:
    def run(self) -> int:
        return 1

    def take_back(self) -> str:
        return ""


class _Place(Receiver):
    """Restores nothing."""

    def _require(self, facts: dict[str, Any], name: str) -> None: ...

    def _restoring(self, place: str, name: str) -> Any:
        return _Nothing()


def serve(top: Path) -> None:
    import socket

    nothing: Any = None
    context = keys(top, server=True)
    with (
        Interrupts() as interrupts,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        print(listener.getsockname()[1], flush=True)
        place = str(top / "there")
        sys.stdout = sys.stderr
        _Place(nothing, context, place, set(), None, interrupts, once=False).serve(listener)


# --- nodes --------------------------------------------------------------------------------

_KINDS = ("plain", "gpu")
_WAYS = ("moved", "sent_afterwards", "copied_afterwards")


def between_nodes(size: int, asked: argparse.Namespace) -> None:
    ways: list[Way] = [globals()[one] for one in asked.ways]
    options: dict[str, Any] = {"binds": gpu.kit_binds(), "env": gpu.ENVIRONMENT_OF_GRIT}
    with running("forky", **options) as here, running("forky", **options) as there:
        wired(here, there, asked.gbit)
        boards = [gpu.gpu_of(node, capacity=size + (64 << 20)) for node in (here, there)]
        for node in (here, there):
            gpu.configure(node, checksum=asked.checksum)
        jobs = {
            "plain": ["--kind", "cpu", "--cpu-bytes", str(size)],
            "gpu": ["--kind", "hold", "--bytes", str(size)],
        }
        for kind in asked.kinds:
            taken: dict[str, list[dict[str, float]]] = {}
            for _ in range(asked.rounds):
                for way in ways:
                    job = gpu.Job(here, boards[0], "job", "--tick-ms", _HOUR, *jobs[kind])
                    done = job.try_run()
                    assert done.returncode == 0, done.stderr
                    status = job.rootfs() / gpu.STATUS.lstrip("/")
                    gpu.until("its first word", lambda: status.exists() and status.read_text(), 120)  # noqa: B023
                    for node in (here, there):
                        node.path(PLACE).mkdir()
                    touch(_COPIES * size)
                    used = processors_used(here, there)
                    found = way(here, there)
                    used = processors_used(here, there) - used
                    found = {"in all": sum(found.values()), "processors": used, **found}
                    taken.setdefault(way.__name__, []).append(found)
                    print(f"{kind}, {way.__name__}: {told(found)}", flush=True)
                    for node, board in zip((here, there), boards, strict=True):
                        gpu.Job(node, board, "job").end()
                        shutil.rmtree(node.path(PLACE))
            for name, figures in taken.items():
                medians = {key: median([one[key] for one in figures]) for key in figures[0]}
                print(f"{kind}, {name}, median of {asked.rounds}: {told(medians)}", flush=True)


_COPIES = 4
"""The container's memory here and there, and its images here and there."""


def touch(size: int) -> None:
    """Has the kernel find this much free memory that was in use before. A virtual machine is given
    memory when it is first touched, which takes longer than all else that is done with it; a way
    that ends the container before it makes the next copy would pay less of that."""
    script = (
        "import mmap, sys\nm = mmap.mmap(-1, int(sys.argv[1]))\n"
        "for at in range(0, len(m), mmap.PAGESIZE): m[at] = 1"
    )
    subprocess.run([sys.executable, "-c", script, str(size)], check=True)


def processors_used(*nodes: Node) -> float:
    """Seconds, of all that runs or ran in the nodes, and of this process."""
    mine = os.times()
    total = mine.user + mine.system
    for node in nodes:
        (root,) = node.cgroup_roots()
        facts = dict(line.split() for line in (root / "cpu.stat").read_text().splitlines())
        total += int(facts["usage_usec"]) / 1e6
    return total


def wired(here: Node, there: Node, gbit: float) -> None:
    with tempfile.TemporaryDirectory() as directory:
        top = Path(directory)
        authority(top)
        certificate(top, "node", HERE, THERE)
        for node in (here, there):
            shutil.copytree(top, node.path(KEYS))
    add = ["nsenter", f"--net=/proc/{here.pid}/ns/net", "--", "ip", "link", "add", "wire"]
    peer = ["type", "veth", "peer", "name", "wire", "netns", str(there.pid)]
    subprocess.run([*add, *peer], check=True)
    for node, address in ((here, HERE), (there, THERE)):
        node.run(["ip", "addr", "add", f"{address}/24", "dev", "wire"])
        node.run(["ip", "link", "set", "wire", "up"])
        if gbit:
            shape = f"tc qdisc add dev wire root tbf rate {gbit}gbit burst 1mb latency 20ms"
            subprocess.run(
                ["nsenter", f"--net=/proc/{node.pid}/ns/net", "--", *shape.split()], check=True
            )


def phases(text: str) -> dict[str, float]:
    events = [json.loads(line) for line in text.splitlines()]
    return {one["phase"]: one["seconds"] for one in events if one["event"] == "end"}


def told(seconds: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in seconds.items())


@contextmanager
def receiving(there: Node) -> Iterator[None]:
    """Ends when the container runs there."""
    listen = ["gritctl", "receive", "--once", "--listen", f"{THERE}:{PORT}", "--directory", PLACE]
    with there.popen([*listen, *_KEYS], stdout=subprocess.PIPE) as receiver:
        assert receiver.stdout
        receiver.stdout.readline()
        try:
            yield
        except BaseException:
            receiver.send_signal(signal.SIGTERM)
            raise
        receiver.communicate(timeout=60)


_KEYS = [
    f"--tls-{what}={KEYS}/{name}"
    for what, name in {"cert": "node.crt", "key": "node.key", "ca": "ca.crt"}.items()
]


def moved(here: Node, there: Node) -> dict[str, float]:
    """`gritctl migrate`. Until the container runs there; what is ended here comes after that."""
    with receiving(there):
        words = ["gritctl", "migrate", "--json", "job", "--to", f"{THERE}:{PORT}", *_KEYS]
        found = phases(here.run(words, timeout=600).stdout)
    found.pop("end")
    return found


def sent_afterwards(here: Node, there: Node) -> dict[str, float]:
    """A checkpoint; sent, as by `gritctl migrate`, once it is whole; restored."""
    found = saved(here)
    with receiving(there):
        python = f"{ENVIRONMENT}/bin/python"
        done = here.run([python, "-Ic", _SEND, f"{PLACE}/job", THERE, str(PORT), KEYS], timeout=600)
    took: dict[str, float] = json.loads(done.stdout)
    return found | took


_SEND = """
import json, os, sys
from shim import config, digests
from shim.gritctl import migrate, progress, tls, wire
from shim.gritctl.sending import Sending
directory, there, port, keys = sys.argv[1:]
files = [f"{keys}/{one}" for one in ("node.crt", "node.key", "ca.crt")]
context = tls.context(*files, server=False)
dump = json.load(open(f"{directory}/config.dump"))
id_, ours = os.urandom(16).hex(), dump["grit"]
opened = [migrate._dialled(there, int(port), context) for _ in range(1 + min(4, os.cpu_count()))]
opened[0].send(
    "begin", version=wire.VERSION, id=id_, name=dump["id"], image=dump["rootfsImageName"], room=0,
    snapshotter=ours["snapshotter"], parent=ours["parent"],
    checksum=digests.algorithm(config.load()[1]), key="",
)
opened[0].expect("ready")
for one in opened[1:]:
    one.send("join", id=id_)
    one.expect("ready")
class Seconds(progress.Display):
    def ended(self, phase, *, ok):
        took[phase.name] = phase.seconds
took = {}
sending = Sending(opened[0], opened[1:], Seconds(), dump["id"], there, 600)
sending.follow(directory)
sending.deliver(lambda: None)
sending.close()
print(json.dumps(took))
"""


def copied_afterwards(here: Node, there: Node) -> dict[str, float]:
    """A checkpoint; copied, with neither TLS nor a network; restored."""
    found = saved(here)
    began = time.monotonic()
    shutil.copytree(here.path(f"{PLACE}/job"), there.path(f"{PLACE}/job"))
    found["copy"] = time.monotonic() - began
    began = time.monotonic()
    there.run(["gritctl", "restore", f"{PLACE}/job"], timeout=600)
    found["restore"] = time.monotonic() - began
    return found


def saved(node: Node) -> dict[str, float]:
    words = ["gritctl", "checkpoint", "--exit", "--json", "job", "--to", f"{PLACE}/job"]
    return phases(node.run(words, timeout=600).stdout)


if __name__ == "__main__":
    main()
