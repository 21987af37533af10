"""Cutting bytes into frames: any pieces, any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.ttrpc.frames import (
    DATA,
    MAX_DATA,
    REMOTE_CLOSED,
    REQUEST,
    RESPONSE,
    Frame,
    FrameReader,
    Oversize,
    frame,
)
from shim.ttrpc.status import RESOURCE_EXHAUSTED, StatusError

u8 = st.integers(0, 255)
u32 = st.integers(0, 2**32 - 1)


def described(items: list[Frame | Oversize]) -> list[tuple[object, ...]]:
    return [
        (item.stream_id, item.kind, item.length)
        if isinstance(item, Oversize)
        else (item.stream_id, item.kind, item.flags, item.data)
        for item in items
    ]


def test_a_header_is_ten_bytes_big_endian() -> None:
    assert frame(7, REQUEST, 1, b"ab") == b"\0\0\0\2\0\0\0\7\1\1ab"


@given(st.lists(st.tuples(u32, u8, u8, st.binary(max_size=40))), st.data())
def test_frames_come_out_however_the_bytes_are_cut(
    frames: list[tuple[int, int, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(frame(*each) for each in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    reader = FrameReader()
    found: list[Frame | Oversize] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += reader.feed(stream[start:stop])
    assert described(found) == list(frames)
    assert b"".join(item.raw for item in found if isinstance(item, Frame)) == stream
    assert not reader.in_frame


@given(st.lists(st.binary(max_size=60)))
def test_no_bytes_raise_and_little_is_kept(pieces: list[bytes]) -> None:
    reader = FrameReader()
    for piece in pieces:
        for item in reader.feed(piece):
            assert isinstance(item, (Frame, Oversize))


@given(st.integers(1, 70_000), st.integers(0, 50))
def test_an_oversize_frame_is_thrown_away_and_the_next_is_read(piece: int, before: int) -> None:
    length = MAX_DATA + 1
    stream = frame(1, DATA, 0, b"x" * before) + struct.pack(">IIBB", length, 9, REQUEST, 0)
    stream += bytes(length) + frame(11, REQUEST, 0, b"next")
    reader = FrameReader()
    found: list[Frame | Oversize] = []
    step = max(piece, 4096)
    for start in range(0, len(stream), step):
        found += reader.feed(stream[start : start + step])
    assert described(found) == [
        (1, DATA, 0, b"x" * before),
        (9, REQUEST, length),
        (11, REQUEST, 0, b"next"),
    ]


def test_an_oversize_frame_is_not_kept_in_memory_nor_reported_before_its_end() -> None:
    reader = FrameReader()
    assert reader.feed(struct.pack(">IIBB", 2**32 - 1, 1, REQUEST, 0)) == []
    assert reader.feed(bytes(1 << 16)) == []
    assert reader.in_frame
    assert len(reader._buffer) == 0


def test_a_frame_of_exactly_the_limit_is_fine_and_one_byte_more_is_not() -> None:
    assert len(frame(1, RESPONSE, 0, bytes(MAX_DATA))) == MAX_DATA + 10
    (item,) = FrameReader().feed(frame(1, RESPONSE, 0, bytes(MAX_DATA)))
    assert isinstance(item, Frame)
    with pytest.raises(StatusError, match="4194305 exceeds the maximum") as caught:
        frame(1, RESPONSE, 0, bytes(MAX_DATA + 1))
    assert caught.value.code == RESOURCE_EXHAUSTED


def test_a_whole_frame_is_passed_on_without_a_copy() -> None:
    raw = frame(1, REQUEST, 0, b"payload")
    (item,) = FrameReader().feed(raw)
    assert isinstance(item, Frame)
    assert item.raw is raw


def test_what_ends_a_stream() -> None:
    assert Frame(1, RESPONSE, 0, b"").ends_stream
    assert Frame(1, DATA, REMOTE_CLOSED, b"").ends_stream
    assert not Frame(1, DATA, 0, b"").ends_stream
