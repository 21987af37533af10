"""containerd's gRPC API as far as gritctl uses it: a connection, its calls, and errors that a
person can do something about. Knows nothing of checkpoints.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would write to standard error

import click
import grpc

from shim.gritctl import messages as m
from shim.protowire import Message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

R = TypeVar("R", bound=Message)

ADDRESS = "/run/containerd/containerd.sock"
_LARGEST = 64 << 20  # bytes of one message

TASKS = "containerd.services.tasks.v1.Tasks"
CONTAINERS = "containerd.services.containers.v1.Containers"
SNAPSHOTS = "containerd.services.snapshots.v1.Snapshots"
DIFF = "containerd.services.diff.v1.Diff"
CONTENT = "containerd.services.content.v1.Content"
LEASES = "containerd.services.leases.v1.Leases"
VERSION = "containerd.services.version.v1.Version"
INTROSPECTION = "containerd.services.introspection.v1.Introspection"


class ContainerdError(Exception):
    """A call failed; `code` is a name of gRPC's: NOT_FOUND, UNAVAILABLE, ..."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The two options of every command that talks to containerd; ctr's variables count, too."""
    for option in (
        click.option(
            "-n",
            "--namespace",
            default="default",
            envvar="CONTAINERD_NAMESPACE",
            show_default=True,
            help="containerd's namespace; Kubernetes' is k8s.io.",
        ),
        click.option(
            "-a",
            "--address",
            default=ADDRESS,
            envvar="CONTAINERD_ADDRESS",
            show_default=True,
            help="containerd's socket.",
        ),
    ):
        command = option(command)
    return command


def complete(ctx: click.Context, param: click.Parameter, begun: str) -> list[str]:
    """A shell's completion of a container's id; nothing where containerd is not to be asked."""
    address = ctx.params.get("address") or os.environ.get("CONTAINERD_ADDRESS") or ADDRESS
    namespace = ctx.params.get("namespace") or os.environ.get("CONTAINERD_NAMESPACE") or "default"
    try:
        with Containerd(address, namespace) as connection:
            return [one.id for one in connection.containers() if one.id.startswith(begun)]
    except ContainerdError:
        return []


class Containerd:
    """A connection to the containerd that listens at `address`, within one of its namespaces. It
    waits for each answer as long as it takes, or `seconds`: only for questions, as a Pause or a
    Checkpoint that nobody waits for would leave the container frozen."""

    def __init__(self, address: str, namespace: str, seconds: float | None = None) -> None:
        self._seconds = seconds
        self.address = address.removeprefix("unix://")
        self.namespace = namespace
        try:
            os.stat(self.address)
        except OSError as error:
            raise ContainerdError(
                "UNAVAILABLE",
                f"no containerd at {self.address}: {error.strerror}. Is it running? --address "
                "names another socket",
            ) from error
        if not os.access(self.address, os.R_OK | os.W_OK):
            raise ContainerdError(
                "PERMISSION_DENIED",
                f"{self.address} is not yours to use: be root, or ask for access to that socket",
            )
        limits = [("grpc.max_receive_message_length", _LARGEST)]
        self._channel = grpc.insecure_channel(f"unix:{self.address}", options=limits)

    def __enter__(self) -> Containerd:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def begin(
        self, service: str, method: str, request: Message, reply: type[R], *, lease: str = ""
    ) -> Call[R]:
        """A call under way. What it makes is kept from containerd's clearing by the lease."""
        stub = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=type(request).encode,
            response_deserializer=reply.decode,
        )
        future = stub.future(request, timeout=self._seconds, metadata=self._metadata(lease))
        return Call(future, self.address)

    def call(
        self, service: str, method: str, request: Message, reply: type[R], *, lease: str = ""
    ) -> R:
        """Raises ContainerdError."""
        return self.begin(service, method, request, reply, lease=lease).result()

    def do(self, service: str, method: str, request: Message) -> None:
        """A call whose answer says no more than that it went well. Raises ContainerdError."""
        self.call(service, method, request, m.Nothing)

    def read(self, digest: str) -> Iterator[bytes]:
        """The blob of that digest, in pieces. Raises ContainerdError."""
        stub = self._channel.unary_stream(
            f"/{CONTENT}/Read",
            request_serializer=m.ReadContent.encode,
            response_deserializer=m.Content.decode,
        )
        try:
            for piece in stub(m.ReadContent(digest=digest), metadata=self._metadata("")):
                yield piece.data
        except grpc.RpcError as error:
            raise _explained(error, self.address) from error

    def version(self) -> str:
        return self.call(VERSION, "Version", m.Nothing(), m.Version).version

    def containers(self, wanted: str = "") -> list[m.Container]:
        """All, or those that a filter of containerd's own kind wants."""
        request = m.Filters(filters=[wanted] if wanted else [])
        return self.call(CONTAINERS, "List", request, m.ContainerList).containers

    def task(self, container_id: str) -> m.Task | None:
        """None for a container without one."""
        try:
            request = m.TaskRef(container_id=container_id)
            return self.call(TASKS, "Get", request, m.OneTask).process
        except ContainerdError as error:
            if error.code == "NOT_FOUND":
                return None
            raise

    def pids(self, container_id: str) -> list[int]:
        request = m.TaskRef(container_id=container_id)
        return [one.pid for one in self.call(TASKS, "ListPids", request, m.PidList).processes]

    def _metadata(self, lease: str) -> list[tuple[str, str]]:
        found = [("containerd-namespace", self.namespace)]
        if lease:
            found.append(("containerd-lease", lease))
        # The caller's trace, as programs hand it to those they start.
        trace = [(key, os.environ.get(key.upper(), "")) for key in ("traceparent", "tracestate")]
        return found + [(key, value) for key, value in trace if value]


class Call(Generic[R]):
    """A call under way: `wait` for a while, then ask for its `result`."""

    def __init__(self, future: Any, address: str) -> None:
        self._future = future
        self._address = address
        self._ended = threading.Event()
        future.add_done_callback(lambda _: self._ended.set())

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has come back within that time."""
        return self._ended.wait(seconds)

    def result(self) -> R:
        """Waits for the answer. Raises ContainerdError."""
        self._ended.wait()
        try:
            found: R = self._future.result()
        except grpc.RpcError as error:
            raise _explained(error, self._address) from error
        return found


def _explained(error: Any, address: str) -> ContainerdError:
    code, text = error.code().name, error.details() or "no reason given"
    text = text.removesuffix(": unknown")  # containerd's word for an error without a kind
    if code == "UNAVAILABLE":
        text = f"containerd at {address} does not answer: {text}"
    if code == "DEADLINE_EXCEEDED":
        text = f"containerd at {address} has not answered in time, does it hang? {text}"
    return ContainerdError(code, text)
