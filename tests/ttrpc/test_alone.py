"""The library stands alone, and the proxy's process stays small."""

from __future__ import annotations

import doctest
import shutil
import subprocess
import sys
from pathlib import Path

import shim.ttrpc

ROOT = Path(shim.ttrpc.__file__).parents[2]
NEVER = ["asyncio", "dataclasses", "inspect", "json", "logging", "subprocess", "typing"]


def test_a_copy_of_it_works_with_nothing_else_around(tmp_path: Path) -> None:
    package = tmp_path / "shim"
    shutil.copytree(ROOT / "shim/ttrpc", package / "ttrpc")
    shutil.copy(ROOT / "shim/protowire.py", package)
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import doctest, shim.ttrpc
print(shim.ttrpc.__file__, *doctest.testmod(shim.ttrpc))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    examples = len(doctest.DocTestParser().get_examples(shim.ttrpc.__doc__ or ""))
    assert examples > 0
    assert done.stdout.split() == [str(package / "ttrpc/__init__.py"), "0", str(examples)]
    assert done.stderr == ""


def test_the_proxy_imports_nothing_heavy() -> None:
    program = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from time import perf_counter
begun = perf_counter()
import shim.ttrpc.proxy
print(f"{{(perf_counter() - begun) * 1000:.1f}} ms")
print(*[name for name in {NEVER!r} if name in sys.modules])
print(len(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True
    )
    time, heavy, modules = done.stdout.split("\n")[:3]
    print(f"import of shim.ttrpc.proxy: {time}, {modules} modules in all")
    assert heavy == ""
