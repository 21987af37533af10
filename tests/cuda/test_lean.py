"""What of the CUDA side is imported into the shim stays cheap: it lives beside every container."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEAVY = {"asyncio", "cffi", "ctypes", "dataclasses", "inspect", "json", "logging"}
HEAVY |= {"subprocess", "tempfile", "typing", "_cffi_backend"}


def test_the_shims_part_imports_nothing_heavy() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "import shim.cuda.engine, shim.cuda.record, shim.cuda.discovery; "
        "print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True
    )
    assert HEAVY & set(done.stdout.split()) == set()


def test_a_question_answered_from_the_record_does_not_load_libcuda() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
        "import shim.cuda.command; print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-IS", "-c", program], capture_output=True, text=True, check=True
    )
    assert {"cffi", "_cffi_backend", "subprocess", "json"} & set(done.stdout.split()) == set()
