"""What the kernel does in part is done to the end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shim import offsets


@pytest.fixture(autouse=True)
def three_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3], at))
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:3]], at))


def test_all_is_written_and_read(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        offsets.write(file.fileno(), b"0123456789", 5)
        buffer = bytearray(12)
        assert offsets.read(file.fileno(), memoryview(buffer), 5) == 10  # there is no more
    assert buffer == b"0123456789\0\0"


def test_where_there_is_a_hole(tmp_path: Path) -> None:
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"x", 1 << 20)
        assert offsets.is_hole(file.fileno(), 0, 4096)
        assert not offsets.is_hole(file.fileno(), 0, (1 << 20) + 1)
        assert offsets.is_hole(file.fileno(), 2 << 20, 4096)  # behind the end
        descriptor = file.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        offsets.is_hole(descriptor, 0, 4096)
