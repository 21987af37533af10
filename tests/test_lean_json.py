"""The lean way to read JSON agrees with the standard one, also on what is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import lean_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(VALUES, st.text(alphabet=" \t\r\n"), st.booleans())
def test_reads_what_json_writes(value: object, space: str, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert lean_json.loads(space + text + space) == value


@given(st.text())
def test_quotes_as_json(text: str) -> None:
    assert lean_json.quote(text) == json.dumps(text)


@pytest.mark.parametrize("text", ["", " ", "{", "[1,", '{"a" 1}', "1 2", "nul", '"\n"', "\ufeff1"])
def test_what_is_no_json_is_told_as_json_tells_it(text: str) -> None:
    with pytest.raises(ValueError) as expected:
        json.loads(text)
    # In a process that has not loaded `json`, as those are that use this.
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from shim import lean_json\n"
        "assert 'json' not in sys.modules\n"
        "try: lean_json.loads(sys.argv[2])\n"
        "except ValueError as error: print(error)"
    )
    root = str(Path(lean_json.__file__).parents[1])
    argv = [sys.executable, "-ISXutf8", "-c", program, root, text]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.stdout.rstrip("\n"), done.stderr) == (str(expected.value), "")


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_written_as_it_is_read(value: object) -> None:
    assert json.loads(lean_json.dumps(value)) == value


def test_no_plain_data() -> None:
    with pytest.raises(TypeError, match="object"):
        lean_json.dumps({"a": [object()]})
