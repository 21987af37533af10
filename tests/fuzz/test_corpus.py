"""Every input that is kept is taken or refused as it should be: what was once found stays so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", list(TARGETS))
def test_kept_inputs(name: str) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for one in inputs:
        TARGETS[name](one.read_bytes())
