"""`Results`: measurements as JSON lines, found again by what was measured, so that an interrupted run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

DIGITS = 7

_START = b'{"key": '


class Results:
    """An append-only file of measurements.

    Every line is an object ``{"key": {...}, "values": {...}}``: the key says what was measured (model, scheme, text,
    protocol), the values are what came out.

    Parameters
    ----------
    path : Path
        Made when the first measurement is added, with its folder.

    Raises
    ------
    UserError
        If the file cannot be read as such lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, dict[str, Any]] = {}
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        *lines, rest = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            self._read(number, line)
        if rest:  # cut while it was written: that measurement is made again
            if not lines and not rest.startswith(_START[: len(rest)]):
                raise self._foreign(1)
            os.truncate(path, len(data) - len(rest))

    def _read(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            self._known[_canonical(row["key"])] = row["values"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._foreign(number) from error

    def _foreign(self, number: int) -> UserError:
        what = f"{self.path} line {number} is no measurement of `mixkvq eval`"
        return UserError(f"{what}; remove the line, or give another --out")

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values measured for this key, if there are any."""
        return self._known.get(_canonical(key))

    def rows(self, keys: Iterable[Mapping[str, Any]], what: str) -> list[dict[str, Any]]:
        """The values of all these keys.

        Raises
        ------
        ValueError
            If one has not been measured, saying ``what`` it belongs to.
        """
        found = [self.find(key) for key in keys]
        if None in found:
            raise ValueError(f"{what} has not been measured in full")
        return [values for values in found if values is not None]

    def add(self, key: Mapping[str, Any], values: dict[str, Any]) -> None:
        """Keep a measurement; on disk when this returns."""
        line = json.dumps({"key": dict(key), "values": values}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line)
        self._known[_canonical(key)] = values


def rounded(x: Any) -> Any:
    """A number, or an array as nested lists, with `DIGITS` digits: what goes into a file."""
    x = np.asarray(x, np.float64)
    return [rounded(part) for part in x] if x.ndim else float(f"{float(x):.{DIGITS}g}")


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
