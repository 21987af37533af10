"""Digests of files that are still being written agree with those taken afterwards."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from shim import ahead, digests

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

BLOCK = 4096


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK", BLOCK)


def until_known(digested: ahead.Ahead, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(digested._found) < count:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("algorithm", [digests.SHA256, digests.XXH3])
def test_what_was_digested_while_it_was_written_is_not_read_again(
    tmp_path: Path, algorithm: str
) -> None:
    def take(**known: Mapping[tuple[str, int], bytes]) -> dict[str, str | OSError]:
        return digests.take(paths, algorithm=algorithm, **known)

    pages, other = tmp_path / "pages-1.img", tmp_path / "core-1.img"
    other.write_bytes(bytes(3 * BLOCK))
    with ahead.Ahead(str(tmp_path), algorithm) as digested, open(pages, "wb", buffering=0) as file:
        for number in range(5):
            file.write(bytes([number]) * BLOCK)
            # The last block that is there may not be whole yet.
            until_known(digested, number)
        file.write(b"rest")
        until_known(digested, 5)
    known = digested.stop()
    assert sorted(known) == [("pages-1.img", number) for number in range(5)]

    paths = {path.name: (str(path), path.stat().st_size) for path in (pages, other)}
    assert take(known=known) == take()
    # It is the known ones that are taken, and of one file's blocks only its own.
    wrong = {**known, ("pages-1.img", 2): bytes(32), ("pages-2.img", 0): bytes(32)}
    told = take(known=wrong)
    assert told["pages-1.img"] != take()["pages-1.img"]
    assert told["core-1.img"] == take()["core-1.img"]


def test_a_directory_that_goes_away_is_no_error(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    draft.mkdir()
    with ahead.Ahead(str(draft), digests.SHA256) as digested:
        draft.rmdir()
    assert digested.stop() == {}
