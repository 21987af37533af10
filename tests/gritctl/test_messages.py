"""gritctl's messages against proto/, and what must not come into the shim's processes with it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shim.gritctl import messages
from tests.proto_in_step import assert_in_step


def test_messages_are_in_step_with_proto() -> None:
    assert_in_step("containerd.proto", messages, besides=("Nothing",))


@pytest.mark.parametrize("module", ["cli", "start", "delete", "serve", "tasks", "checkpoint"])
def test_the_shim_imports_nothing_of_it(module: str) -> None:
    program = (
        f"import sys, shim.{module}; "
        "print([m for m in sys.modules "
        "if m.startswith('shim.gritctl') or m.split('.')[0] in ('click', 'rich', 'grpc')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
