"""A protobuf codec small enough for a process that lives beside every pod.

A message is a class whose fields are declared once, with their numbers; from that come a keyword
constructor, `encode` and `decode`. Fields this side does not know are kept as they came and sent
on, because requests are changed in one field and forwarded. This module imports nothing at run
time and must stay so: the shim's daemon, its `start` and its `delete` all stand on it, and the
protobuf package would cost them more than the rest together.

    class Mount(Message):
        type: str = string(1)
        source: str = string(2)
        options: list[str] = repeated(string(4))

    class CreateTaskRequest(Message):
        id: str = string(1)
        rootfs: list[Mount] = repeated(message(3, Mount))
        options: Any_ | None = message(10, Any_)

    request = CreateTaskRequest.decode(payload)
    request.id = "other"
    payload = request.encode()

Presence follows proto3: a plain scalar is left off the wire when it is zero, `optional(...)` makes
None mean absent and everything else be sent (which is also what proto2 wants), a message is None
when absent.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar, Self, TypeVar, dataclass_transform

    T = TypeVar("T")
    M = TypeVar("M", bound="Message")
else:

    def dataclass_transform(**_):
        return lambda cls: cls


VARINT, FIXED64, LENGTH, GROUP, END_GROUP, FIXED32 = range(6)
MAX_FIELD_NUMBER = (1 << 29) - 1

_U64 = (1 << 64) - 1
_INT_RANGES = {
    "int32": (-(1 << 31), (1 << 31) - 1),
    "enum": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint32": (0, (1 << 32) - 1),
    "uint64": (0, _U64),
    "bool": (0, 1),
}


class DecodeError(ValueError):
    """The bytes encode no such message (truncated, overlong, not UTF-8); all `decode` raises."""


class Field:
    """One row of a message's table.

    `kind` is protobuf's own type name (int32, string, message, ...), or "map" for a
    map<string, string>; `label` is "singular" (a proto3 scalar, or a message), "optional"
    (explicit presence) or "repeated".
    """

    __slots__ = ("kind", "label", "message", "name", "number")

    def __init__(self, number: int, kind: str, message: type[Message] | None = None) -> None:
        if not 1 <= number <= MAX_FIELD_NUMBER:
            raise ValueError(f"field number {number} is outside 1..{MAX_FIELD_NUMBER}")
        self.name = ""
        self.number = number
        self.kind = kind
        self.label = "repeated" if kind == "map" else "singular"
        self.message = message

    def default(self) -> Any:
        """A fresh value of an absent field."""
        if self.kind == "map":
            return {}
        if self.label == "repeated":
            return []
        if self.label == "optional" or self.kind == "message":
            return None
        return {"string": "", "bytes": b"", "bool": False}.get(self.kind, 0)


# The declarations. To the type checker each is a value of the field's Python type, so that the
# annotation beside it is checked; at run time each is a Field, which the metaclass takes out of the
# class body.


def _declare(number: int, kind: str, message: type[Message] | None = None) -> Any:
    return Field(number, kind, message)


def int32(number: int) -> int:
    return _declare(number, "int32")  # type: ignore[no-any-return]


def int64(number: int) -> int:
    return _declare(number, "int64")  # type: ignore[no-any-return]


def uint32(number: int) -> int:
    return _declare(number, "uint32")  # type: ignore[no-any-return]


def uint64(number: int) -> int:
    return _declare(number, "uint64")  # type: ignore[no-any-return]


def enum(number: int) -> int:
    """An enum; values are plain ints, and unknown ones survive."""
    return _declare(number, "enum")  # type: ignore[no-any-return]


def bool_(number: int) -> bool:
    return _declare(number, "bool")  # type: ignore[no-any-return]


def string(number: int) -> str:
    return _declare(number, "string")  # type: ignore[no-any-return]


def bytes_(number: int) -> bytes:
    return _declare(number, "bytes")  # type: ignore[no-any-return]


def message(number: int, cls: type[M]) -> M:
    """A message; annotate `Cls | None`, since it is None when absent."""
    return _declare(number, "message", cls)  # type: ignore[no-any-return]


def string_map(number: int) -> dict[str, str]:
    """map<string, string>; reads any repeated {key = 1, value = 2}; the last of a key wins."""
    return _declare(number, "map")  # type: ignore[no-any-return]


def optional(field: T) -> T | None:
    """Explicit presence (proto3 `optional`, all of proto2): None is absent, zero is sent."""
    return _relabel(field, "optional")  # type: ignore[no-any-return]


def repeated(field: T) -> list[T]:
    """A list; numbers are sent packed and taken either way."""
    return _relabel(field, "repeated")  # type: ignore[no-any-return]


def _relabel(field: Any, label: str) -> Any:
    field.label = label
    return field


class _MessageType(type):
    """Turns the declared fields into slots and the tables `encode` and `decode` run over."""

    def __new__(mcls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> _MessageType:
        fields = []
        for key, value in list(body.items()):
            if isinstance(value, Field):
                del body[key]
                value.name = key
                fields.append(value)
        if len({field.number for field in fields}) != len(fields):
            raise TypeError(f"message {name} declares a field number twice")
        fields.sort(key=lambda field: field.number)
        if bases:
            body["__slots__"] = tuple(field.name for field in fields)
            body["FIELDS"] = tuple(fields)
            body["_BY_NAME"] = {field.name: field for field in fields}
            body["_BY_TAG"] = _tag_table(fields)
            body["_WRITERS"] = tuple((field.name, _writer(field)) for field in fields)
            body["_ZEROES"] = tuple((f.name, f.default()) for f in fields if f.label != "repeated")
            body["_CONTAINERS"] = tuple(
                (f.name, dict if f.kind == "map" else list) for f in fields if f.label == "repeated"
            )
        return super().__new__(mcls, name, bases, body)


@dataclass_transform(kw_only_default=True)
class Message(metaclass=_MessageType):
    """Base of all messages: subclass it directly and declare fields. Mutable, compared by value."""

    __slots__ = ("_unknown",)

    FIELDS: ClassVar[tuple[Field, ...]] = ()
    _BY_NAME: ClassVar[dict[str, Field]] = {}
    _BY_TAG: ClassVar[dict[int, tuple[Field, Callable[[Any], Any] | None]]] = {}
    _WRITERS: ClassVar[tuple[tuple[str, Callable[[bytearray, Any], None]], ...]] = ()
    _ZEROES: ClassVar[tuple[tuple[str, Any], ...]] = ()
    _CONTAINERS: ClassVar[tuple[tuple[str, Callable[[], Any]], ...]] = ()

    def __init__(self, **values: Any) -> None:
        self._unknown = b""
        for name, zero in self._ZEROES:
            setattr(self, name, zero)
        for name, container in self._CONTAINERS:
            setattr(self, name, container())
        for name, value in values.items():
            if name not in self._BY_NAME:
                raise TypeError(f"{type(self).__name__} has no field {name!r}")
            setattr(self, name, value)

    def encode(self) -> bytes:
        """The wire form: known fields by number, then the unknown ones as they came.

        Raises ValueError for a number outside its field's range, TypeError for a wrong type.
        """
        out = bytearray()
        for name, write in self._WRITERS:
            value = getattr(self, name)
            if value is not None:
                try:
                    write(out, value)
                except (ValueError, TypeError, AttributeError) as error:
                    raise _encode_error(error, f"{type(self).__name__}.{name}") from None
        out += self._unknown
        return bytes(out)

    @classmethod
    def decode(cls, data: bytes | bytearray | memoryview) -> Self:
        """The message that `data` encodes. Raises DecodeError and nothing else."""
        data = bytes(data)
        self = cls()
        self._merge(data, 0, len(data))
        return self

    def _merge(self, data: bytes, pos: int, end: int) -> None:
        by_tag = self._BY_TAG
        unknown_parts = []
        while pos < end:
            start = pos
            tag = data[pos]
            if tag < 0x80:
                pos += 1
            else:
                tag, pos = _read_varint(data, pos, end)
            entry = by_tag.get(tag)
            if entry is None:
                pos = _skip(data, pos, end, tag)
                unknown_parts.append(data[start:pos])
                continue
            field, convert = entry
            number, pos = _read_varint(data, pos, end)
            if tag & 7 == VARINT:
                assert convert is not None
                self._put(field, convert(number))
                continue
            stop = pos + number
            if stop > end:
                where = f"{type(self).__name__}.{field.name}"
                raise DecodeError(f"{where}: {number} bytes announced, {end - pos} left")
            self._put_length_delimited(field, convert, data, pos, stop)
            pos = stop
        if unknown_parts:
            self._unknown += b"".join(unknown_parts)

    def _put(self, field: Field, value: Any) -> None:
        if field.label == "repeated":
            getattr(self, field.name).append(value)
        else:
            setattr(self, field.name, value)

    def _put_length_delimited(
        self, field: Field, convert: Callable[[Any], Any] | None, data: bytes, pos: int, stop: int
    ) -> None:
        kind = field.kind
        if kind == "string":
            self._put(field, self._text(field, data[pos:stop]))
        elif kind == "bytes":
            self._put(field, data[pos:stop])
        elif kind == "message":
            assert field.message is not None
            # A message seen twice is merged, as protobuf wants; in a list each is its own.
            seen = None if field.label == "repeated" else getattr(self, field.name)
            if seen is None:
                seen = field.message()
                self._put(field, seen)
            seen._merge(data, pos, stop)
        elif kind == "map":
            entry = _MapEntry()
            entry._merge(data, pos, stop)
            getattr(self, field.name)[entry.key] = entry.value
        else:
            assert convert is not None
            values = getattr(self, field.name)
            while pos < stop:
                number, pos = _read_varint(data, pos, stop)
                values.append(convert(number))

    def _text(self, field: Field, raw: bytes) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise DecodeError(
                f"{type(self).__name__}.{field.name}: not UTF-8 at byte {error.start}"
            ) from None

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._unknown == other._unknown and all(
            getattr(self, field.name) == getattr(other, field.name) for field in self.FIELDS
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in self.FIELDS
            if getattr(self, field.name) != field.default()
        ]
        if self._unknown:
            shown.append(f"<{len(self._unknown)} bytes of unknown fields>")
        return f"{type(self).__name__}({', '.join(shown)})"


def _encode_error(error: Exception, where: str) -> Exception:
    """The same kind of error with the field's path in front, which grows from the inside out."""
    text = f"{where}: {error}"
    return ValueError(text) if isinstance(error, ValueError) else TypeError(text)


# Reading


def _read_varint(data: bytes, pos: int, end: int) -> tuple[int, int]:
    """The varint at `pos` and the position behind it; at most ten bytes and 64 bits."""
    if pos < end and data[pos] < 0x80:
        return data[pos], pos + 1
    value = shift = 0
    while pos < end:
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value > _U64:
                break
            return value, pos
        shift += 7
        if shift == 70:
            break
    else:
        raise DecodeError("the data ends within a varint")
    raise DecodeError("a varint longer than 64 bits")


def _skip(data: bytes, pos: int, end: int, tag: int) -> int:
    """The position behind the unknown field whose tag was just read; checks it is well formed."""
    open_groups: list[int] = []
    while True:
        number, wire_type = tag >> 3, tag & 7
        if not 1 <= number <= MAX_FIELD_NUMBER:
            raise DecodeError(f"field number {number} is outside 1..{MAX_FIELD_NUMBER}")
        if wire_type == VARINT:
            _, pos = _read_varint(data, pos, end)
        elif wire_type == LENGTH:
            length, pos = _read_varint(data, pos, end)
            pos += length
        elif wire_type == FIXED64:
            pos += 8
        elif wire_type == FIXED32:
            pos += 4
        elif wire_type == GROUP:
            open_groups.append(number)
        elif wire_type == END_GROUP:
            if not open_groups or open_groups.pop() != number:
                raise DecodeError(f"field {number}: end of a group that was not open")
        else:
            raise DecodeError(f"field {number}: wire type {wire_type} does not exist")
        if pos > end:
            raise DecodeError(f"field {number}: the data ends within it")
        if not open_groups:
            return pos
        tag, pos = _read_varint(data, pos, end)


def _to_int32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _to_int64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _to_uint32(value: int) -> int:
    return value & 0xFFFFFFFF


def _to_uint64(value: int) -> int:
    return value


_FROM_VARINT: dict[str, Callable[[int], Any]] = {
    "int32": _to_int32,
    "enum": _to_int32,
    "int64": _to_int64,
    "uint32": _to_uint32,
    "uint64": _to_uint64,
    "bool": bool,
}


def _tag_table(fields: list[Field]) -> dict[int, tuple[Field, Callable[[Any], Any] | None]]:
    """Tag (number, wire type) to field: a known number with a foreign wire type is unknown."""
    table: dict[int, tuple[Field, Callable[[Any], Any] | None]] = {}
    for field in fields:
        convert = _FROM_VARINT.get(field.kind)
        if convert is not None:
            table[field.number << 3 | VARINT] = (field, convert)
        if convert is None or field.label == "repeated":
            table[field.number << 3 | LENGTH] = (field, convert)
    return table


# Writing


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _write_sized(out: bytearray, tag: bytes, raw: bytes) -> None:
    out += tag
    length = len(raw)
    if length < 0x80:
        out.append(length)
    else:
        out += _varint(length)
    out += raw


def _int_to_varint(kind: str) -> Callable[[int], bytes]:
    low, high = _INT_RANGES[kind]

    def to_varint(value: int) -> bytes:
        if not low <= value <= high:
            raise ValueError(f"{value!r} does not fit {kind}")
        # Negative numbers travel as 64 bits whatever the field's width.
        return _varint(value & _U64)

    return to_varint


def _to_bytes(kind: str) -> Callable[[Any], bytes]:
    if kind == "string":
        return str.encode
    if kind == "bytes":
        return bytes
    return Message.encode


def _writer(field: Field) -> Callable[[bytearray, Any], None]:
    """The function that appends one field's value, tag and all, to the output."""
    if field.kind in _INT_RANGES:
        return _varint_writer(field)
    if field.kind == "map":
        return _map_writer(field)
    tag = _varint(field.number << 3 | LENGTH)
    to_bytes = _to_bytes(field.kind)
    if field.label == "repeated":

        def write(out: bytearray, value: Any) -> None:
            for item in value:
                _write_sized(out, tag, to_bytes(item))
    elif field.label == "optional" or field.kind == "message":

        def write(out: bytearray, value: Any) -> None:
            _write_sized(out, tag, to_bytes(value))
    else:

        def write(out: bytearray, value: Any) -> None:
            if value:
                _write_sized(out, tag, to_bytes(value))

    return write


def _varint_writer(field: Field) -> Callable[[bytearray, Any], None]:
    tag = _varint(field.number << 3 | VARINT)
    to_varint = _int_to_varint(field.kind)
    if field.label == "repeated":
        packed_tag = _varint(field.number << 3 | LENGTH)

        def write(out: bytearray, value: Any) -> None:
            if value:
                _write_sized(out, packed_tag, b"".join([to_varint(item) for item in value]))
    elif field.label == "optional":

        def write(out: bytearray, value: Any) -> None:
            out += tag + to_varint(value)
    else:

        def write(out: bytearray, value: Any) -> None:
            if value:
                out += tag + to_varint(value)

    return write


def _map_writer(field: Field) -> Callable[[bytearray, Any], None]:
    tag = _varint(field.number << 3 | LENGTH)

    def write(out: bytearray, value: Any) -> None:
        for key, item in value.items():
            _write_sized(out, tag, _MapEntry(key=key, value=item).encode())

    return write


class _MapEntry(Message):
    key: str = string(1)
    value: str = string(2)
