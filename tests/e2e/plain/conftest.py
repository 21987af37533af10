"""Nodes of all three containerd generations, with cgroup v1: there every controller is to be had,
so limits, metrics and the OOM killer can be tried."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("tests.e2e.plain.sides")

from tests.e2e.conftest import running  # noqa: E402
from tests.e2e.gpu import configure  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.nodes.node import Node


@pytest.fixture(scope="module", params=["12", "13", "forky"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """The module's own, since some of its tests end containerd."""
    with running(request.param, cgroup="v1") as node:
        configure(node)
        yield node
