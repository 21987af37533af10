"""Services of a containerd over gRPC, from the .proto files beside this one: nothing is generated,
the messages are made when the tests start."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

if TYPE_CHECKING:
    from google.protobuf.descriptor import ServiceDescriptor

HERE = Path(__file__).parent


class ServiceError(Exception):
    """The service refused; the message is its own."""

    def __init__(self, method: str, error: grpc.RpcError) -> None:
        self.code = error.code()
        super().__init__(f"{method}: {error.details()}")


@functools.cache
def _services(proto: str) -> list[ServiceDescriptor]:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "set")
        arguments = ["protoc", f"--proto_path={HERE}", f"--descriptor_set_out={out}"]
        assert protoc.main([*arguments, str(HERE / proto)]) == 0, f"{proto} does not compile"
        (file,) = FileDescriptorSet.FromString(out.read_bytes()).file
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    prefix = f"{file.package}." if file.package else ""
    return [pool.FindServiceByName(f"{prefix}{service.name}") for service in file.service]


class Services:
    """A connection to the socket at `path` of this host, and the methods of all services in
    `proto`. `namespace` is containerd's, for its own services, `lease` what keeps its garbage
    collector away from what is made."""

    def __init__(self, path: Path, proto: str, namespace: str = "", lease: str = "") -> None:
        self._channel = grpc.insecure_channel(f"unix://{path}")
        given = {"containerd-namespace": namespace, "containerd-lease": lease}
        self._metadata = [(key, value) for key, value in given.items() if value]
        self._methods = {}
        for service in _services(proto):
            for method in service.methods:
                reply = message_factory.GetMessageClass(method.output_type)
                request = message_factory.GetMessageClass(method.input_type)
                call = self._channel.unary_unary(
                    f"/{service.full_name}/{method.name}",
                    request_serializer=request.SerializeToString,
                    response_deserializer=reply.FromString,
                )
                self._methods[method.name] = (request, call)

    def __call__(self, method: str, *, deadline: float = 120, **fields: Any) -> Any:
        """One call, its request made of `fields` (messages as mappings), given up after
        `deadline` seconds; raises ServiceError."""
        request, call = self._methods[method]
        try:
            return call(
                request(**fields), timeout=deadline, metadata=self._metadata, wait_for_ready=True
            )
        except grpc.RpcError as error:
            raise ServiceError(method, error) from None

    def close(self) -> None:
        self._channel.close()
