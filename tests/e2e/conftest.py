"""Real nodes for the end-to-end tests.

`node` is 13 and then forky; `node12`, `node13` and `node_forky` are one each; all have this
tree's shim installed and containerd running, and live as long as the session. A test that
kills containerd or wants its own configuration makes a node for itself with `make_node`.
`gpu_node` has a simulated GPU, `start_job` runs GPU jobs there.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e import gpu
from tests.nodes.image import build_image
from tests.nodes.installed import installed_node, refresh

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu


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


@pytest.fixture(scope="session", params=["13", "forky"])
def gpu_node(request: pytest.FixtureRequest) -> Iterator[tuple[Node, SimGpu]]:
    """Nodes with one simulated GPU of 16 MiB: 13 with cgroup v1, forky with v2. There the runtime
    io.containerd.runc.v2 is grit, too."""
    name = request.param
    cgroup = {"13": "v1", "forky": "v2"}[name]
    env = gpu.ENVIRONMENT_OF_GRIT
    with running(name, cgroup=cgroup, binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        yield node, gpu.gpu_of(node, capacity=16 << 20)


@pytest.fixture
def start_job(gpu_node: tuple[Node, SimGpu]) -> Iterator[Callable[..., gpu.Job]]:
    """Starts jobs on the node; at the test's end they are removed, and nothing may be left of
    them: no process, mount, socket, directory, cgroup, device memory."""
    node, board = gpu_node
    before = node.leaks()
    jobs: list[gpu.Job] = []

    def start(*words: str, name: str = "job", run: bool = True, **options: Any) -> gpu.Job:
        jobs.append(gpu.Job(node, board, name, *words, **options))
        return jobs[-1].run() if run else jobs[-1]

    yield start
    board.end_faults()
    for job in jobs:
        job.end()
        job.remove_checkpoints()
    with contextlib.suppress(AssertionError):
        gpu.until("end without leaks", lambda: not node.leaks() - before, 10)
    left = node.leaks() - before
    assert not left, left
    assert board.owners() == {}


@pytest.fixture
def images(gpu_node: tuple[Node, SimGpu]) -> Iterator[str]:
    """An image directory, yet to be made, in GRIT's layout: room for a root file system's diff
    beside it."""
    node, _ = gpu_node
    place = "/var/tmp/grit-test"
    node.path(place).mkdir()
    yield f"{place}/checkpoint"
    node.run(["rm", "-r", place])


@pytest.fixture(params=["driver", "plugin"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each CUDA engine's name."""
    return str(request.param)
