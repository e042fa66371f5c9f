"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from math import isinf
from typing import Any

MAX_COUNT = 1 << 62
"""What a whole number in a file is at most, where nothing smaller bounds it: sums of two are still int64."""
MAX_DEPTH = 64
"""How deep objects and lists may be in each other: those who walk them by recursion, as `copy` does, get to the end."""
_ESCAPE = re.compile(r"\\(?:u(?:d[89ab]..\\ud[c-f]..|(d[89a-f]..)|....)|.)", re.IGNORECASE)


def parse(text: str) -> Any:
    """Read JSON in which names are unique, numbers are those of JSON, finite as a float, and text can be encoded.

    Raises
    ------
    ValueError
        For anything else, and for objects and lists deeper in each other than `MAX_DEPTH`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)
    except RecursionError:
        raise _too_deep() from None
    for escape in _ESCAPE.finditer(text):
        if escape[1]:
            raise ValueError(f"\\u{escape[1]} is half a character")
    _check_depth(value)
    return value


def text_of(value: Any, indent: int | None = None) -> str:
    """JSON that `parse` reads.

    Raises
    ------
    ValueError
        Saying what it would refuse, such as a NaN, or ``value`` holding itself.
    """
    try:
        text = json.dumps(value, indent=indent, separators=(",", ": " if indent else ":"))
    except RecursionError:
        raise _too_deep() from None
    parse(text)
    return text


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep() -> ValueError:
    return ValueError(f"objects and lists are more than {MAX_DEPTH} deep in each other")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; the same name twice would leave open which one counts."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.80} is given twice")
        found[name] = value
    return found


def _finite(text: str) -> float:
    """A float; JSON has no infinity, so that what is read can be written again."""
    number = float(text)
    if isinf(number):
        raise ValueError(f"{text:.40} is too large for a float")
    return number


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")
