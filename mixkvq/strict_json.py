"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any

MAX_COUNT = 1 << 62
"""What a whole number in a file is at most, where nothing smaller bounds it: sums of two are still int64."""
MAX_DEPTH = 64
"""How deep objects and lists may be in each other: those who walk them by recursion, as `copy` does, get to the end."""
_MARK = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)
"""A string, also one that does not end, so that each character is looked at once; what opens; what closes."""
_ESCAPE = re.compile(r"\\(?:u(?:d[89ab]..\\ud[c-f]..|(d[89a-f]..)|....)|.)", re.IGNORECASE)


def parse(text: str) -> Any:
    """Read JSON in which names are unique, numbers are those of JSON, finite as a float, and text can be encoded.

    Raises
    ------
    ValueError
        For anything else, and for objects and lists deeper in each other than `MAX_DEPTH`.
    """
    if _deeper(text, MAX_DEPTH):
        raise ValueError(f"objects and lists are more than {MAX_DEPTH} deep in each other")
    value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)
    for escape in _ESCAPE.finditer(text):
        if escape[1]:
            raise ValueError(f"\\u{escape[1]} is half a character")
    return value


def _deeper(text: str, most: int) -> bool:
    """Whether objects and lists are deeper in each other; told from the text, so that no recursion is needed."""
    depth = 0
    for mark in _MARK.finditer(text):
        if mark.lastindex == 1:
            depth += 1
            if depth > most:
                return True
        elif mark.lastindex == 2:
            depth -= 1
    return False


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
