"""A node for all cells, a container for each, and the table that their outcomes make."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e import gpu
from tests.e2e.conftest import running
from tests.matrix import table
from tests.matrix.cell import PLACE, Cell
from tests.soak.box import SMALL, Box, clear, connect, pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from tests.nodes.node import Node
    from tests.simgpu.simgpu import SimGpu

    Pattern = tuple[dict[str, Any], str]

outcomes: dict[table.Cell, str] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, (fault, operation, phase, came) in report.user_properties:
        if name == "matrix" and (report.when == "call" or report.failed):
            outcomes[fault, operation, phase] = came if report.passed else "**failed**"


def pytest_sessionfinish(session: pytest.Session) -> None:
    node = session.config.getoption("--matrix-node")
    written = table.written()
    if outcomes and session.config.getoption("--write-matrix") and node == "forky":
        table.write(table.tables({**written, **outcomes}))
    elif "tests/matrix" in " ".join(session.config.args):
        for cell, came in outcomes.items():
            if came != written.get(cell):
                print(f"\n{node}: {', '.join(cell)}: {came}, not {written.get(cell)}", end="")


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> Iterator[tuple[Node, SimGpu, Pattern]]:
    """The node, with one simulated GPU, and what a job on it is made of."""
    env = gpu.ENVIRONMENT_OF_GRIT
    name = request.config.getoption("--matrix-node")
    cgroup = {"13": "v1", "forky": "v2"}[name]
    with running(name, cgroup=cgroup, binds=gpu.kit_binds(), env=env) as node:
        gpu.grit_as_runc(node)
        board = gpu.gpu_of(node, capacity=16 << 20)
        gpu.configure(node, lane_from=4096)
        with connect(node) as containerd:
            job = gpu.Job(node, board, "job", *SMALL, runtime=gpu.honouring(node))
            made = pattern(job, containerd)
        node.path(gpu.FAILPOINTS).mkdir()
        yield node, board, made


@pytest.fixture
def cell(
    request: pytest.FixtureRequest,
    place: tuple[Node, SimGpu, Pattern],
    record_property: Callable[[str, object], None],
) -> Iterator[Cell]:
    """A container with a GPU, running, all of whose device memory goes past CRIU, unless the test
    has other settings; afterwards nothing may be left of it."""
    node, board, (spec, parent) = place
    gpu.configure(node, **getattr(request, "param", {"lane_from": 4096}))
    before = node.leaks()
    with connect(node) as containerd:
        box = Box(
            node, containerd, "job", copy.deepcopy(spec), parent, gpu.CONFIG, gpu.honouring(node)
        )
        try:
            box.start()
            box.check()
            yield Cell(node, board, box, record_property)
        finally:
            board.end_faults()
            clear(node, gpu.FAILPOINTS)
            node.path(gpu.FAILPOINTS).mkdir()
            box.remove()
            clear(node, PLACE)
            clear(node, "/var/log/containerd-shim-grit")
            box.containerd.__exit__()
    with contextlib.suppress(AssertionError):
        gpu.until("an end without leaks", lambda: not node.leaks() - before, 15)
    assert not node.leaks() - before
    assert board.owners() == {}


IN_MAKE_TEST = (
    "test_error_in_a_checkpoint[EIO-dump]",
    "test_error_in_a_restore[ENOSPC-restore-gpu]",
    "test_connection_dropped_in_a_checkpoint[freeze]",
    "test_criu_in_a_restore[killed]",
    "test_criu_out_of_memory_in_a_checkpoint[without the lane]",
    "test_failing_disk_in_a_checkpoint[write]",
)
"""One cell of each kind; all of them only where this directory is asked for."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if any("tests/matrix" in word for word in config.args):
        return
    here = Path(__file__).parent
    left_out = [one for one in items if here in one.path.parents and one.name not in IN_MAKE_TEST]
    if left_out:
        items[:] = [one for one in items if one not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)
