"""For every test: the quick ones first, and what some of their outcomes are written down for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e import compatibility

if TYPE_CHECKING:
    from collections.abc import Generator

CELLS = pytest.StashKey[set[compatibility.Cell]]()
OUTCOMES = pytest.StashKey[dict[compatibility.Cell, bool]]()
ALL_CELLS = 28
"""How many there are: fewer were collected when only some tests are run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "write the table in docs/compatibility.md from the outcomes of the tests marked cell"
    parser.addoption("--write-table", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    line = "cell(client, **where): fills a cell of the table in docs/compatibility.md"
    config.addinivalue_line("markers", line)
    config.stash[CELLS], config.stash[OUTCOMES] = set(), {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Unit tests before end-to-end tests: what is broken shows early."""
    items.sort(key=lambda item: "tests/e2e/" in item.nodeid)
    if config.getoption("--write-table"):
        items[:] = [item for item in items if compatibility.cell_of(item)]
    config.stash[CELLS] = {cell for cell in map(compatibility.cell_of, items) if cell}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cell = compatibility.cell_of(item)
    if cell and (report.when == "call" or report.failed):
        item.config.stash[OUTCOMES][cell] = report.passed
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The table is written, or held against what came out, once all its tests have run."""
    outcomes = session.config.stash[OUTCOMES]
    if len(outcomes) < ALL_CELLS:
        return
    text = compatibility.table(dict(sorted(outcomes.items())))
    if session.config.getoption("--write-table"):
        compatibility.write(text)
    elif text != compatibility.written():
        print(f"\n{compatibility.DOCUMENT} says otherwise than the tests: make table\n{text}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
