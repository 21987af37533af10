"""Real nodes for the end-to-end tests.

`node` is 13 and then forky; `node12`, `node13` and `node_forky` are one each; all have this
tree's shim installed and containerd running, and live as long as the session. A test that
kills containerd or wants its own configuration makes a node for itself with `make_node`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.nodes.image import build_image
from tests.nodes.installed import installed_node, refresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.nodes.node import Node


@contextlib.contextmanager
def running(name: str, config: str | None = None, **options: Any) -> Iterator[Node]:
    """A node with the shim installed, containerd running and the busybox image imported."""
    env = options.pop("env", None)
    with installed_node(name, **options) as node:
        refresh(node)
        node.start_containerd(config, env=env)
        node.import_image(build_image("local/busybox", "1", {}))
        yield node


@pytest.fixture(scope="session")
def node12() -> Iterator[Node]:
    """containerd 1.6: what needs no CRIU."""
    with running("12") as node:
        yield node


@pytest.fixture(scope="session")
def node13() -> Iterator[Node]:
    """containerd 1.7, CRIU 4.1."""
    with running("13") as node:
        yield node


@pytest.fixture(scope="session")
def node_forky() -> Iterator[Node]:
    """containerd 2.1, CRIU 4.2."""
    with running("forky") as node:
        yield node


@pytest.fixture(params=["13", "forky"])
def node(request: pytest.FixtureRequest) -> Node:
    """Each of the nodes that can checkpoint."""
    node: Node = request.getfixturevalue({"13": "node13", "forky": "node_forky"}[request.param])
    return node


@pytest.fixture
def make_node() -> Iterator[Callable[..., Node]]:
    """Makes nodes of the test's own: `make_node("13", cgroup="v1", config=...)`."""
    with contextlib.ExitStack() as stack:
        yield lambda name, **options: stack.enter_context(running(name, **options))
