"""`gritctl receive`: waits for containers that `gritctl migrate` sends from other nodes.

A container's life here is bound to its control connection until the other node has said `keep`:
if that is cut before, what came is removed and what runs is ended, since it goes on over there.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import threading

import click

from shim import config, digests, sealed, signing
from shim.checkpoint_dir import CheckpointDirError
from shim.gritctl import containerd, restore, tls, wire
from shim.gritctl.arrival import Arrival, ArrivalError
from shim.gritctl.containerd import Containerd
from shim.gritctl.interrupts import Interrupts
from shim.gritctl.wire import Connection, WireError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HELLO_SECONDS = 10.0
_KEEP_SECONDS = 30.0
_LOOK_SECONDS = 0.2
_MOST_CONNECTIONS = 128

_ID = re.compile(r"[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")  # containerd's, pkg/identifiers
_LONGEST_NAME = 76


@click.command("receive", short_help="wait for containers that move to this node")
@click.option(
    "--listen", metavar="ADDRESS:PORT", required=True, help="Where to; port 0 takes a free one."
)
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    required=True,
    help="Where their checkpoints go and stay, each in a directory of its container's name.",
)
@click.option(
    "--peer",
    "peers",
    metavar="NAME",
    multiple=True,
    help="Take containers only from a node whose certificate has this name; several may be given. "
    "Else from every node with a certificate of the authority.",
)
@click.option(
    "--logs", metavar="DIR", help="Where their output goes, as NAME.log; nowhere if not given."
)
@click.option("--once", is_flag=True, help="End when one has come.")
@tls.options
@containerd.options
def command(
    listen: str,
    directory: str,
    peers: tuple[str, ...],
    logs: str | None,
    once: bool,
    tls_cert: str,
    tls_key: str,
    tls_ca: str,
    namespace: str,
    address: str,
) -> int:
    """Wait for containers that `gritctl migrate` moves to this node, and restore them from what
    comes. The image must be on the node. Ends by Ctrl-C.

    Who has a certificate of the authority may start containers here with any rights: let it be an
    authority for nothing else, or name the nodes by --peer.

    \b
    Example:
      gritctl receive --listen 0.0.0.0:7433 --directory /var/lib/checkpoints --tls-cert node.crt --tls-key node.key --tls-ca ca.crt
    """  # noqa: E501
    context = tls.context(tls_cert, tls_key, tls_ca, server=True)
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isdecimal():
        raise click.BadParameter(f"{listen!r} is not ADDRESS:PORT")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        Containerd(address, namespace) as connection,
        Interrupts() as interrupts,
        socket.create_server((host, int(port)), family=family) as listener,
    ):
        shown = "{}:{}".format(*listener.getsockname())
        print(f"listens on {shown}", flush=True)
        place = os.path.abspath(directory)
        Receiver(connection, context, place, set(peers), logs, interrupts, once).serve(listener)
    return 0


class Coming:
    """A checkpoint under way: from whom, and the streams that bring it."""

    def __init__(self, arrival: Arrival, certificate: bytes) -> None:
        self.arrival, self.certificate = arrival, certificate
        self.streams: list[Connection] = []
        self.failure = ""


class Receiver:
    def __init__(
        self,
        connection: Containerd,
        context: ssl.SSLContext,
        directory: str,
        peers: set[str],
        logs: str | None,
        interrupts: Interrupts,
        once: bool,
    ) -> None:
        self.containerd = connection
        self.directory = directory
        self._context, self._peers, self._logs = context, peers, logs
        self._interrupts, self._once = interrupts, once
        self._coming: dict[str, Coming] = {}
        self._kept = 0

    def serve(self, listener: socket.socket) -> None:
        """Until interrupted, or with `once` until a container has come."""
        listener.settimeout(_LOOK_SECONDS)
        threads: list[threading.Thread] = []
        while not self._stopping():
            try:
                sock, address = listener.accept()
            except TimeoutError:
                continue
            threads = [thread for thread in threads if thread.is_alive()]
            if len(threads) >= _MOST_CONNECTIONS:
                sock.close()
                continue
            # Not daemons: what they have begun is theirs to undo.
            threads.append(threading.Thread(target=self._meet, args=[sock, address[0]]))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _stopping(self) -> bool:
        return self._interrupts.came or (self._once and self._kept > 0)

    def _meet(self, sock: socket.socket, address: str) -> None:
        """A connection from its first byte to its last."""
        try:
            wire.tune(sock)
            sock.settimeout(_HELLO_SECONDS)
            secured = self._context.wrap_socket(sock, server_side=True)
        except (OSError, ValueError) as error:
            sock.close()
            _say(f"{address}: refused: {error}")
            return
        connection = Connection(secured)
        try:
            names = tls.names(secured)
            if self._peers and not self._peers & names:
                raise ArrivalError(f"no --peer has the name {', '.join(sorted(names))}")
            connection.send("hello")
            self.talk(connection, secured.getpeercert(binary_form=True) or b"", address)
        except (ArrivalError, WireError) as error:
            _say(f"{address}: {error}")
            _answer_failed(connection, error)
        finally:
            connection.close()

    def talk(self, connection: Connection, certificate: bytes, address: str) -> None:
        """With a peer who has shown his certificate. Raises ArrivalError or WireError."""
        facts, _ = connection.receive(idle=wire.within(_HELLO_SECONDS))
        id_ = wire.text(facts, "id")
        if facts.get("op") == "join":
            coming = self._coming.get(id_)
            if coming is None or coming.certificate != certificate:
                raise ArrivalError("joins what is not under way")
            self._take(connection, coming)
        elif facts.get("op") == "begin":
            if facts.get("version") != wire.VERSION:
                raise ArrivalError(
                    f"speaks version {facts.get('version')!r} of this, and here is version "
                    f"{wire.VERSION}: have the same grit on both nodes"
                )
            if not _ID.fullmatch(id_) or id_ in self._coming:
                raise ArrivalError("has no id of its own")
            self._lead(connection, facts, id_, certificate, address)
        else:
            raise ArrivalError("begins with neither begin nor join")

    def _take(self, connection: Connection, coming: Coming) -> None:
        """A stream: writes what comes, until it is cut."""
        coming.streams.append(connection)
        buffer = memoryview(bytearray(wire.CHUNK))
        synced = False
        try:
            connection.send("ready")
            while True:
                try:
                    facts, size = connection.receive(buffer)
                except WireError:
                    if synced:
                        return
                    raise
                op = facts.get("op")
                synced = op == "sync"
                if op == "sync":
                    connection.send("synced")
                elif op == "chunk":
                    name, offset = wire.text(facts, "file"), wire.number(facts, "offset")
                    coming.arrival.write(name, offset, buffer[:size])
                elif op == "hole":
                    name, offset = wire.text(facts, "file"), wire.number(facts, "offset")
                    coming.arrival.leave_hole(name, offset, wire.number(facts, "length"))
                else:
                    raise ArrivalError(f"a stream says {op!r}")
        except (ArrivalError, WireError, OSError) as error:
            coming.failure = coming.failure or str(error)
            if isinstance(error, OSError):
                raise ArrivalError(str(error)) from error
            raise

    def _lead(
        self,
        connection: Connection,
        facts: dict[str, Any],
        id_: str,
        certificate: bytes,
        address: str,
    ) -> None:
        """The control connection of one container, to its life here or to nothing."""
        name = wire.text(facts, "name")
        if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
            raise ArrivalError(f"{name[:100]!r} is no container's name")
        coming: Coming | None = None
        made: restore.Restoring | None = None
        kept = False

        def idle() -> None:
            if self._interrupts.came:
                raise ArrivalError("gritctl receive was interrupted")
            if coming and coming.failure:
                raise ArrivalError(coming.failure)

        try:
            self._require(facts, name)
            place = os.path.join(self.directory, name)
            checksum = wire.text(facts, "checksum")
            if checksum not in (digests.SHA256, digests.XXH3):
                raise ArrivalError(f"takes digests by {checksum[:100]!r}")
            digests.new(checksum)  # that it can be, here
            arrival = Arrival(place, wire.number(facts, "room"), checksum)
            coming = Coming(arrival, certificate)
            self._coming[id_] = coming
            connection.send("ready")
            sizes = _sizes(connection.expect("commit", idle))
            coming.arrival.publish(sizes)
            connection.send("stored")
            made = self._restoring(place, name)
            pid = made.run()
            connection.send("runs", pid=pid)
            connection.expect("keep", wire.within(_KEEP_SECONDS))
            kept = True
        except Exception as error:
            undone = self._undo(coming, made)
            _say(f"{address}: container {name} did not come: {error}. {undone}")
            _answer_failed(connection, error)
            return
        finally:
            self._coming.pop(id_, None)
            for stream in coming.streams if coming else ():
                stream.cut()
            self._kept += kept
        _say(f"{address}: {name}: runs, pid {pid}, restored from {place}")
        try:
            connection.send("kept")
        except WireError as error:
            _say(f"{address}: does not know that {name} runs here: {error}")

    def _require(self, facts: dict[str, Any], name: str) -> None:
        """Raises what speaks against a container of that image and name, before it is saved."""
        snapshotter, parent = wire.text(facts, "snapshotter"), wire.text(facts, "parent")
        image = wire.text(facts, "image")
        restore.require_image(self.containerd, snapshotter, parent, image, name)
        _require_key(wire.text(facts, "key"))

    def _restoring(self, place: str, name: str) -> restore.Restoring:
        log = os.path.join(self._logs, f"{name}.log") if self._logs else ""
        one = restore.opened(place)
        return restore.Restoring(self.containerd, one, name, {}, log, self._interrupts)

    def _undo(self, coming: Coming | None, made: restore.Restoring | None) -> str:
        done = made.take_back() if made else "Nothing of it is left"
        try:
            if coming:
                coming.arrival.remove()
        except CheckpointDirError as error:
            return f"{done}, but {error}"
        return done


def _require_key(identity: str) -> None:
    """Raises ArrivalError where what is encrypted with that key could not be restored."""
    if identity:
        try:
            sealed.key_for(config.load()[1], identity)
        except (sealed.SealError, signing.SigningError) as error:
            raise ArrivalError(f"its checkpoint is encrypted, and here {error}") from error


def _sizes(facts: dict[str, Any]) -> dict[str, int]:
    files = facts.get("files")
    if not isinstance(files, dict):
        raise WireError("the peer said no files")
    return {name: wire.number(files, name) for name in files}


def _answer_failed(connection: Connection, error: Exception) -> None:
    try:
        connection.send("failed", error=str(error))
    except WireError:
        pass  # it knows, or is gone


def _say(text: str) -> None:
    print(text, flush=True)
