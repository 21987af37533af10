from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory whose path is short enough for a unix socket in it."""
    directory = Path(tempfile.mkdtemp(prefix="ttrpc."))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def inner(place: Path) -> Path:
    return place / "inner"


@pytest.fixture
def outer(place: Path) -> Path:
    return place / "outer"
