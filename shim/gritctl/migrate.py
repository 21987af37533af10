"""`gritctl migrate`: a container to another node, where `gritctl receive` waits for it."""

from __future__ import annotations

import os
import socket
import ssl
import time

import click

from shim import checkpoint_dir, config, digests, sealed
from shim.gritctl import containerd, output, progress, saving, stored, targets, tls, wire
from shim.gritctl.cli import FAILED, INTERRUPTED
from shim.gritctl.interrupts import Interrupted, Interrupts
from shim.gritctl.sending import InDoubt, Sending
from shim.gritctl.wire import Connection, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.gritctl.targets import Target
    from shim.sealed import Key

_ANSWER_SECONDS = 30.0
_MOST_STREAMS = 16


class MigrateError(Exception):
    """Nothing was done to the container; says why."""


@click.command("migrate", short_help="move a container to another node")
@click.argument("name", metavar="CONTAINER", shell_complete=containerd.complete)
@click.option(
    "--to", "there", metavar="HOST:PORT", required=True, help="Where gritctl receive listens."
)
@click.option("--name", "new_name", metavar="NAME", help="The container's id there; its own here.")
@click.option(
    "--streams",
    type=click.IntRange(1, _MOST_STREAMS),
    default=min(4, len(os.sched_getaffinity(0))),
    help="Connections that share the work; as many as processors, 4 at most.",
)
@click.option(
    "--scratch",
    metavar="DIR",
    type=click.Path(),
    default=stored.PLACE,
    show_default=True,
    help="Where the checkpoint lies meanwhile; a tmpfs is quickest.",
)
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="How long the other node may take to restore it.",
)
@tls.options
@containerd.options
@output.json_option
def command(
    name: str,
    there: str,
    new_name: str | None,
    streams: int,
    scratch: str,
    timeout: float,
    tls_cert: str,
    tls_key: str,
    tls_ca: str,
    namespace: str,
    address: str,
    as_json: bool,
) -> int:
    """Move a running container to another node, where `gritctl receive` waits: its checkpoint is
    sent while it is written, restored there, and the container here is ended once the other runs.

    Whatever fails before, and Ctrl-C, leaves the container running here and nothing there.

    \b
    Example:
      gritctl migrate job --to node-b:7433 --tls-cert node.crt --tls-key node.key --tls-ca ca.crt
    """
    host, port = _address(there)
    context = tls.context(tls_cert, tls_key, tls_ca, server=False)
    key = sealed.key(config.load()[1])
    with containerd.Containerd(address, namespace) as connection:
        found, pod = targets.find(connection, name)
        if pod:
            raise MigrateError(
                f"{name} is a pod, which Kubernetes has to make on the other node: see docs/"
                "kubernetes.md. Nothing was done"
            )
        (target,) = found
        if target.task.terminal:
            raise MigrateError(
                f"container {target.id} has a terminal, which gritctl cannot give it on the other "
                "node. Nothing was done"
            )
        if scratch == stored.PLACE:
            os.makedirs(scratch, mode=0o700, exist_ok=True)
        directory = os.path.join(os.path.abspath(scratch), f"{target.id}.migrating")
        if os.path.lexists(directory):
            raise MigrateError(
                f"{directory} is what a killed gritctl migrate has left: remove it, gritctl rm "
                f"{directory}. Nothing was done"
            )
        display = progress.choose(as_json)
        began = time.monotonic()
        sending: Sending | None = None
        try:
            with Interrupts() as interrupts:
                sending = Sending(
                    *_connect(connection, target, host, port, context, new_name, streams, key),
                    display, target.id, there, timeout, encrypted=key is not None,
                )  # fmt: skip
                saving.Saving(
                    connection,
                    found,
                    directory,
                    display,
                    interrupts,
                    pod=False,
                    end=True,
                    elsewhere=sending,
                ).run()
        except (saving.SavingError, MigrateError, InDoubt, Interrupted) as error:
            told = _in_doubt(error, target, there) if isinstance(error, InDoubt) else str(error)
            progress.failed(display, told)
            return INTERRUPTED if isinstance(error, Interrupted) else FAILED
        finally:
            display.close()
            if sending:
                sending.close()
            if os.path.lexists(directory):
                checkpoint_dir.remove(directory)
    seconds = time.monotonic() - began
    if isinstance(display, progress.Json):
        display.finished(event="done", to=there, bytes=sending.bytes, seconds=round(seconds, 3))
    else:
        size = output.size(sending.bytes)
        print(f"{target}: runs on {there}, {size} sent in {output.seconds(seconds)}")
    return 0


def _connect(
    connection: containerd.Containerd,
    target: Target,
    host: str,
    port: int,
    context: ssl.SSLContext,
    new_name: str | None,
    streams: int,
    key: Key | None,
) -> tuple[Connection, list[Connection]]:
    """The control connection and the streams, once the other node has said that it could take the
    container. Raises MigrateError."""
    container = target.container
    id_ = os.urandom(16).hex()
    opened: list[Connection] = []
    try:
        for number in range(streams + 1):
            opened.append(_dialled(host, port, context))
            if number == 0:
                opened[0].send(
                    "begin",
                    version=wire.VERSION,
                    id=id_,
                    name=new_name or target.id,
                    image=container.image,
                    snapshotter=container.snapshotter,
                    parent=saving.parent_of(connection, container),
                    checksum=digests.algorithm(config.load()[1]),
                    key=key.identity if key else "",
                    room=sum(map(saving.memory_of, connection.pids(target.id))),
                )
            else:
                opened[-1].send("join", id=id_)
            opened[-1].expect("ready", wire.within(_ANSWER_SECONDS))
    except (WireError, OSError) as error:
        for one in opened:
            one.close()
        reason = checkpoint_dir.reason(error) if isinstance(error, OSError) else str(error)
        raise MigrateError(
            f"{host}:{port} does not take container {target.id}: {reason}. Nothing was done to it"
        ) from error
    return opened[0], opened[1:]


def _dialled(host: str, port: int, context: ssl.SSLContext) -> Connection:
    """Raises WireError or OSError."""
    sock = socket.create_connection((host, port), timeout=_ANSWER_SECONDS)
    wire.tune(sock)
    try:
        found = Connection(context.wrap_socket(sock, server_hostname=host))
        found.expect("hello", wire.within(_ANSWER_SECONDS))  # or why our certificate is none
    except BaseException:
        sock.close()
        raise
    return found


def _address(text: str) -> tuple[str, int]:
    """HOST:PORT, an IPv6 address in brackets."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise click.BadParameter(f"{text!r} is not HOST:PORT")
    return host, int(port)


def _in_doubt(error: InDoubt, target: Target, there: str) -> str:
    return (
        f"{error}. Container {target.id} stays paused here, so that it cannot run twice. Look "
        f"whether it runs on {there}: if so, kill it here; if not, gritctl resume {target.id}"
    )
