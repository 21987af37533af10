"""For every test: the quick ones first, and what some of their outcomes are written down for."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.e2e import compatibility

ALL_CELLS = 40
"""How many there are: fewer come out when only some tests are run."""

outcomes: dict[compatibility.Cell, bool] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the table in docs/compatibility.md from the outcomes of the tests marked cell"
    parser.addoption("--write-table", action="store_true", help=text)
    text = "write the tables in docs/fault-matrix.md from the outcomes of the tests in tests/matrix"
    parser.addoption("--write-matrix", action="store_true", help=text)
    text = "the node of tests/matrix: 13 with cgroup v1, or forky with v2, of which the tables tell"
    parser.addoption("--matrix-node", choices=("13", "forky"), default="forky", help=text)


def pytest_configure(config: pytest.Config) -> None:
    line = "cell(client, **where): fills a cell of the table in docs/compatibility.md"
    config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unit tests before end-to-end tests: what is broken shows early. Of both the long files come
    first, so that at the end no process is left alone with one: those whose tests say so by a
    timeout of their own, then those with many tests."""
    long = {item.path for item in items if item.get_closest_marker("timeout")}
    size = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[bool, bool, int]:
        return "tests/e2e/" in item.nodeid, item.path not in long, -size[item.path]

    items.sort(key=place)
    if config.getoption("--write-table"):
        items[:] = [item for item in items if compatibility.cell_of(item)]


def pytest_itemcollected(item: pytest.Item) -> None:
    """A report tells its cell also where the test ran in another process (xdist)."""
    cell = compatibility.cell_of(item)
    if cell:
        item.user_properties.append(("cell", cell))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, cell in report.user_properties:
        if name == "cell" and (report.when == "call" or report.failed):
            client, containerd, runtime, engine = cell  # a list, from another process
            outcomes[client, containerd, runtime, engine] = report.passed


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The table is written, or held against what came out, once all its tests have run."""
    if len(outcomes) < ALL_CELLS:
        return
    text = compatibility.table(dict(sorted(outcomes.items())))
    if session.config.getoption("--write-table"):
        compatibility.write(text)
    elif text != compatibility.written():
        print(f"\n{compatibility.DOCUMENT} says otherwise than the tests: make table\n{text}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
