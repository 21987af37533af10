"""The lean codec against google's implementation and against hostile bytes."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError as GoogleDecodeError
from hypothesis import given
from hypothesis import strategies as st

from shim.protowire import (
    DecodeError,
    Message,
    bool_,
    bytes_,
    enum,
    int32,
    int64,
    message,
    optional,
    repeated,
    string,
    string_map,
    uint32,
    uint64,
)


class Leaf(Message):
    name: str = string(1)
    size: int = uint64(2)


class Tree(Message):
    i32: int = int32(1)
    i64: int = int64(2)
    u32: int = uint32(3)
    u64: int = uint64(4)
    flag: bool = bool_(5)
    mode: int = enum(6)
    text: str = string(7)
    raw: bytes = bytes_(8)
    leaf: Leaf | None = message(9, Leaf)
    leaves: list[Leaf] = repeated(message(10, Leaf))
    words: list[str] = repeated(string(11))
    numbers: list[int] = repeated(int32(12))
    labels: dict[str, str] = string_map(13)
    maybe: int | None = optional(int32(14))
    maybe_text: str | None = optional(string(15))
    far: int = uint32(50000)


def reference() -> Any:
    """The same message for google's implementation, described by hand."""
    kinds: dict[str, Any] = {
        "int32": 5,
        "int64": 3,
        "uint32": 13,
        "uint64": 4,
        "bool": 8,
        "enum": 14,
        "string": 9,
        "bytes": 12,
        "message": 11,
    }
    file = descriptor_pb2.FileDescriptorProto(name="tree.proto", package="t", syntax="proto3")
    mode = file.enum_type.add(name="Mode")
    mode.value.add(name="ZERO", number=0)
    for cls in (Leaf, Tree):
        described = file.message_type.add(name=cls.__name__)
        for field in cls.FIELDS:
            label = 3 if field.label == "repeated" else 1
            row: Any = described.field.add(name=field.name, number=field.number)
            row.label = label
            if field.kind == "map":
                entry = described.nested_type.add(name="LabelsEntry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, type=9, label=1)
                entry.field.add(name="value", number=2, type=9, label=1)
                row.type, row.type_name = 11, ".t.Tree.LabelsEntry"
                continue
            row.type = kinds[field.kind]
            if field.message:
                row.type_name = f".t.{field.message.__name__}"
            if field.kind == "enum":
                row.type_name = ".t.Mode"
            if field.label == "optional":
                row.proto3_optional = True
                row.oneof_index = len(described.oneof_decl)
                described.oneof_decl.add(name=f"_{field.name}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Tree"))


GoogleTree = reference()

i32 = st.integers(-(2**31), 2**31 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
leaf = st.builds(Leaf, name=st.text(max_size=5), size=u64)
tree = st.builds(
    Tree,
    i32=i32,
    i64=st.integers(-(2**63), 2**63 - 1),
    u32=u32,
    u64=u64,
    flag=st.booleans(),
    mode=i32,
    text=st.text(),
    raw=st.binary(),
    leaf=st.none() | leaf,
    leaves=st.lists(leaf, max_size=3),
    words=st.lists(st.text(), max_size=3),
    numbers=st.lists(i32, max_size=4),
    labels=st.dictionaries(st.text(), st.text(), max_size=3),
    maybe=st.none() | i32,
    maybe_text=st.none() | st.text(),
    far=u32,
)


@given(tree)
def test_what_is_encoded_decodes_to_the_same(value: Tree) -> None:
    assert Tree.decode(value.encode()) == value


@given(tree)
def test_google_reads_what_we_write_and_we_read_what_google_writes(value: Tree) -> None:
    theirs = GoogleTree.FromString(value.encode())
    assert theirs.i32 == value.i32
    assert theirs.mode == value.mode
    assert theirs.text == value.text
    assert dict(theirs.labels) == value.labels
    assert list(theirs.numbers) == value.numbers
    assert theirs.HasField("maybe") == (value.maybe is not None)
    assert Tree.decode(theirs.SerializeToString()) == value


@given(st.binary())
def test_hostile_bytes_raise_decode_error_or_nothing(data: bytes) -> None:
    try:
        value = Tree.decode(data)
    except DecodeError:
        return
    assert Tree.decode(value.encode()) == value


@given(tree, st.data())
def test_a_cut_or_flipped_encoding_raises_decode_error_or_nothing(
    value: Tree, data: st.DataObject
) -> None:
    raw = bytearray(value.encode() + b"\x08\x01")
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    with contextlib.suppress(DecodeError):
        Tree.decode(raw[:cut])


@given(st.binary())
def test_what_we_refuse_google_refuses_and_what_we_take_google_takes(data: bytes) -> None:
    def accepted(parse: Any) -> bool:
        try:
            parse(data)
        except (DecodeError, GoogleDecodeError):
            return False
        return True

    assert accepted(Tree.decode) == accepted(GoogleTree.FromString)


def test_unknown_fields_survive_decode_and_encode() -> None:
    class Old(Message):
        i32: int = int32(1)

    sent = Tree(i32=7, text="kept", leaf=Leaf(name="kept too"), far=9, numbers=[1, -2])
    forwarded = Old.decode(sent.encode())
    forwarded.i32 = 8
    sent.i32 = 8
    assert Tree.decode(forwarded.encode()) == sent
    assert "unknown" in repr(forwarded)


def test_fixed_width_and_group_fields_are_kept_as_unknown() -> None:
    raw = b"\xa1\x06" + b"8" * 8 + b"\xad\x06" + b"4" * 4 + b"\xb3\x06\x08\x01\xb4\x06"
    assert Leaf.decode(raw).encode() == raw


def test_a_known_number_with_another_wire_type_is_unknown() -> None:
    raw = b"\x08\x05"  # field 1 as varint, Leaf.name is a string
    value = Leaf.decode(raw)
    assert value.name == "" and value.encode() == raw


def test_packed_and_unpacked_numbers_are_both_taken() -> None:
    assert Tree.decode(b"\x62\x02\x01\x02\x60\x03").numbers == [1, 2, 3]


def test_negative_int32_takes_ten_bytes() -> None:
    assert Tree(i32=-1).encode() == b"\x08" + b"\xff" * 9 + b"\x01"


def test_absent_and_zero() -> None:
    assert Tree().encode() == b""
    assert Tree(maybe=0, maybe_text="", leaf=Leaf()).encode() == b"\x4a\x00\x70\x00\x7a\x00"
    assert Tree.decode(b"").maybe is None
    assert Tree.decode(b"\x70\x00").maybe == 0


def test_a_message_seen_twice_is_merged_and_the_last_scalar_wins() -> None:
    raw = b"\x4a\x03\x0a\x01a" + b"\x4a\x02\x10\x05" + b"\x08\x01\x08\x02"
    assert Tree.decode(raw) == Tree(leaf=Leaf(name="a", size=5), i32=2)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x08", "ends within a varint"),
        (b"\x08" + b"\xff" * 10, "longer than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "longer than 64 bits"),
        (b"\x3a\x05ab", "5 bytes announced, 2 left"),
        (b"\x3a\x02\xff\xfe", "Tree.text: not UTF-8"),
        (b"\x4a\x03\x0a\x01\xff", "Leaf.name: not UTF-8"),
        (b"\x00\x01", "field number 0"),
        (b"\xa1\x06123", "ends within it"),
        (b"\xb3\x06", "ends within a varint"),
        (b"\xb4\x06", "was not open"),
        (b"\xb6\x06", "wire type 6"),
    ],
)
def test_decode_errors_say_what_is_wrong(data: bytes, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        Tree.decode(data)


def test_encode_errors_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"Tree\.leaf: Leaf\.size: -1 does not fit uint64"):
        Tree(leaf=Leaf(size=-1)).encode()
    with pytest.raises(TypeError, match=r"Tree\.text"):
        Tree(text=b"x").encode()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has no field 'nope'"):
        Tree(nope=1)  # type: ignore[call-arg]


def test_deeply_nested_unknown_groups_do_not_exhaust_the_stack() -> None:
    deep = 100_000
    assert Leaf.decode(b"\x1b" * deep + b"\x1c" * deep).name == ""


def test_a_number_declared_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="twice"):

        class Bad(Message):
            a: int = int32(1)
            b: int = int32(1)


def test_messages_have_no_dict_and_are_compared_by_value() -> None:
    value = Leaf(name="a")
    with pytest.raises(AttributeError):
        value.other = 1  # type: ignore[attr-defined]
    assert value == Leaf(name="a") != Leaf(name="b")
    assert repr(Tree(i32=1, leaf=value)) == "Tree(i32=1, leaf=Leaf(name='a'))"


def test_importing_it_imports_nothing_but_future() -> None:
    code = (
        "import sys; before = set(sys.modules); import shim.protowire;"
        "print(sorted(set(sys.modules) - before))"
    )
    out = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "['__future__', 'shim', 'shim.protowire']"
