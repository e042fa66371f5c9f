"""`Results`: measurements as JSON lines, found again by what was measured, so that an interrupted run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError


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
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # cut while it was written: that measurement is made again
                path.write_text("".join(lines[:-1]))
                lines.pop()
            for number, line in enumerate(lines, 1):
                self._read(number, line)

    def _read(self, number: int, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[_canonical(row["key"])] = row["values"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} line {number} is no measurement of `mixkvq eval`; remove the line, or give another --out"
            ) from error

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The values measured for this key, if there are any."""
        return self._known.get(_canonical(key))

    def add(self, key: Mapping[str, Any], values: dict[str, Any]) -> None:
        """Keep a measurement; on disk when this returns."""
        line = json.dumps({"key": dict(key), "values": values}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line)
        self._known[_canonical(key)] = values


def _canonical(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
