"""rpc.py and proto/criu_rpc.proto say the same, and both speak as protobuf itself does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from shim.criu_bridge import rpc
from shim.protowire import Message

ROOT = Path(__file__).parents[2]
KINDS = {
    name.removeprefix("TYPE_").lower(): number
    for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}
MESSAGES = [
    value
    for value in vars(rpc).values()
    if isinstance(value, type) and issubclass(value, Message) and value is not Message
]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> descriptor_pb2.FileDescriptorProto:
    out = tmp_path_factory.mktemp("proto") / "criu_rpc.binpb"
    flags = [f"-I{ROOT / 'proto'}", f"--descriptor_set_out={out}"]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", *flags, "criu_rpc.proto"], check=True
    )
    return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


def test_every_message_is_described_and_every_description_used(
    described: descriptor_pb2.FileDescriptorProto,
) -> None:
    assert {m.__name__ for m in MESSAGES} == {m.name for m in described.message_type}


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_fields_are_in_step(
    kind: type[Message], described: descriptor_pb2.FileDescriptorProto
) -> None:
    theirs = next(m for m in described.message_type if m.name == kind.__name__)
    repeated = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    assert {(f.name, f.number, f.type, f.label == repeated) for f in theirs.field} == {
        (f.name, f.number, KINDS[f.kind], f.label == "repeated") for f in kind.FIELDS
    }


def test_enum_values_are_in_step(described: descriptor_pb2.FileDescriptorProto) -> None:
    for enum in described.enum_type:
        for value in enum.value:
            assert getattr(rpc, value.name) == value.number


def test_a_request_reads_the_same_through_the_protobuf_library(
    described: descriptor_pb2.FileDescriptorProto,
) -> None:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described)
    theirs: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("grit.criu.CriuReq"))
    ours = rpc.CriuReq(
        type=rpc.DUMP,
        opts=rpc.CriuOpts(
            images_dir_fd=0,
            pid=-1,
            leave_running=False,
            manage_cgroups_mode=rpc.CG_IGNORE,
            ext_mnt=[rpc.ExtMountMap(key="/a", val="/b")],
            external=["net[1]:extRootNetNS"],
        ),
    )
    parsed = theirs.FromString(ours.encode())
    # What is zero is on the wire all the same: CRIU takes absence for its own default.
    assert parsed.opts.HasField("images_dir_fd")
    assert parsed.opts.HasField("leave_running")
    assert parsed.opts.manage_cgroups_mode == 0
    assert not parsed.opts.HasField("timeout")
    assert parsed.opts.pid == -1
    assert rpc.CriuReq.decode(parsed.SerializeToString()) == ours
