"""Fixtures for the CUDA side: a cgroup that freezes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.cuda.freezer import Freezer


@pytest.fixture
def freezer() -> Iterator[Freezer]:
    made = Freezer(f"grit-test-{os.getpid()}")
    yield made
    made.remove()
