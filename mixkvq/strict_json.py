"""JSON from files that anybody may have written."""

from __future__ import annotations

import json
from math import isinf
from typing import Any


def parse(text: str) -> Any:
    """Read JSON in which every name is unique and every number is one of JSON, and finite as a float.

    Raises
    ------
    ValueError, RecursionError
        For anything else.
    """
    return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_no_constant)


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
