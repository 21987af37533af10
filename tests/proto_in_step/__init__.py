"""Checks that messages declared on shim/protowire.py say the same as the .proto files beside them.

def test_in_step() -> None:
    assert_in_step("ttrpc.proto", shim.ttrpc.messages)
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import ModuleType

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

from shim.protowire import Field, Message

PROTO = Path(__file__).resolve().parents[2] / "proto"

Row = tuple[str, int, str, str]
"""A field's name, number, kind (for a message its name) and label."""


def assert_in_step(proto: str, *modules: ModuleType, besides: tuple[str, ...] = ()) -> None:
    """Every message of `proto` is declared in the modules with the same fields, and none else is.

    A class's trailing underscore is not part of its message's name; the classes named in `besides`
    have no message of their own.
    """
    lean = {
        name.rstrip("_"): lean_rows(cls)
        for module in modules
        for name, cls in vars(module).items()
        if isinstance(cls, type)
        and issubclass(cls, Message)
        and cls.__module__ == module.__name__
        and name not in besides
    }
    wire = proto_rows(proto)
    assert lean, f"no messages in {', '.join(module.__name__ for module in modules)}"
    assert sorted(lean) == sorted(wire), f"messages declared against messages in {proto}"
    for name, rows in wire.items():
        assert lean[name] == rows, f"fields of {name} declared against those in {proto}"


def lean_rows(cls: type[Message]) -> list[Row]:
    """The table of a lean message."""
    return [
        (field.name, field.number, _lean_kind(field), _lean_label(field)) for field in cls.FIELDS
    ]


@functools.cache
def proto_rows(proto: str) -> dict[str, list[Row]]:
    """The tables of all messages in a .proto file, nested ones too, by simple name."""
    tables: dict[str, list[Row]] = {}
    file = _compile(proto)

    def add(message: DescriptorProto) -> None:
        maps = {nested.name for nested in message.nested_type if nested.options.map_entry}
        rows = [_proto_row(field, maps, file.syntax) for field in message.field]
        tables[message.name] = sorted(rows, key=lambda row: row[1])
        for nested in message.nested_type:
            if nested.name not in maps:
                add(nested)

    for message in file.message_type:
        add(message)
    return tables


def _compile(proto: str) -> FileDescriptorProto:
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory, "set")
        arguments = ["protoc", f"--proto_path={PROTO}", f"--descriptor_set_out={out}"]
        assert protoc.main([*arguments, str(PROTO / proto)]) == 0, f"{proto} does not compile"
        return FileDescriptorSet.FromString(out.read_bytes()).file[0]


def _proto_row(field: FieldDescriptorProto, maps: set[str], syntax: str) -> Row:
    kind = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    if kind == "message":
        kind = field.type_name.rpartition(".")[2]
        if kind in maps:
            return field.name, field.number, "map", "repeated"
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        label = "repeated"
    elif field.type == FieldDescriptorProto.TYPE_MESSAGE:
        label = "singular"
    else:
        label = "optional" if field.proto3_optional or syntax in ("", "proto2") else "singular"
    return field.name, field.number, kind, label


def _lean_kind(field: Field) -> str:
    return field.message.__name__.rstrip("_") if field.message else field.kind


def _lean_label(field: Field) -> str:
    # A message has presence whether it is declared optional or not.
    return "singular" if field.message and field.label == "optional" else field.label
