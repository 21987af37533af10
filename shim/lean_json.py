"""JSON for the processes that live for milliseconds: the standard library's own scanner without
its front, whose import (regular expressions, which the scanner does not use) costs 6 ms."""

from __future__ import annotations

from _json import encode_basestring_ascii as quote
from _json import make_scanner

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["dumps", "loads", "quote"]

_SPACE = " \t\n\r"


class _Plain:
    """What json.JSONDecoder tells the scanner when nobody asks for anything special."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = float  # NaN, Infinity and -Infinity
    memo: dict[str, str] = {}  # noqa: RUF012


_scan = make_scanner(_Plain)  # type: ignore[arg-type]


def dumps(value: object) -> str:
    """JSON of plain data: dictionaries with strings for keys, lists, tuples, strings, numbers,
    booleans, None. Raises TypeError for anything else."""
    if isinstance(value, str):
        return quote(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quote(key)}: {dumps(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(dumps, value)) + "]"
    raise TypeError(f"{type(value).__name__} is no plain data")


def loads(text: str) -> Any:
    """What `json.loads` makes of `text`. Raises ValueError as that does."""
    try:
        value, end = _scan(text, len(text) - len(text.lstrip(_SPACE)))
        if not text[end:].strip(_SPACE):
            return value
    except Exception:  # before Python 3.12 a SystemError, if `json` is not loaded
        pass
    import json

    return json.loads(text)  # says what is wrong with it
