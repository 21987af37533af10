"""For every test: the quick ones first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests before end-to-end tests: what is broken shows early."""
    items.sort(key=lambda item: "tests/e2e/" in item.nodeid)
