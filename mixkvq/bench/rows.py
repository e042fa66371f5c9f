"""`Row`: one timed case, as a line of JSON; a file of them begins with a line about the machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..eval.stats import Interval, excess_ratio_interval, median_interval
from .turns import Times


@dataclass(frozen=True)
class Row:
    """One timed case.

    Attributes
    ----------
    bench : str
        Name of the command.
    where : dict
        What all cases that took turns have in common: head_dim, tokens, threads, ...
    system : str
        What ran.
    seconds : Times
        By round.
    facts : dict
        Bytes, errors, and whatever else belongs to it.
    """

    bench: str
    where: dict[str, Any]
    system: str
    seconds: Times
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def taken(self) -> NDArray[np.float64]:
        """Seconds of the rounds in which it took part."""
        return np.array([t for t in self.seconds if t is not None], np.float64)

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.taken))

    @property
    def best(self) -> float:
        """Seconds."""
        return float(self.taken.min())


def paired(*rows: Row) -> list[NDArray[np.float64]]:
    """Seconds of each row in the rounds in which all took part.

    Raises
    ------
    ValueError
        If the rows did not take turns, or never in the same round.
    """
    if any(row.where != rows[0].where or len(row.seconds) != len(rows[0].seconds) for row in rows):
        raise ValueError(f"rows are of {[row.where for row in rows]}, must have taken turns")
    rounds = [times for times in zip(*(row.seconds for row in rows), strict=True) if None not in times]
    if not rounds:
        raise ValueError(f"rows {[row.system for row in rows]} have no round in common")
    return list(np.array(rounds, np.float64).T)


def times_faster(row: Row, rival: Row) -> Interval:
    """How many times as long the rival takes: the median over rounds, with its 95 % interval."""
    ours, theirs = paired(row, rival)
    return median_interval(theirs / ours)


def times_faster_beyond(row: Row, rival: Row, base: Row) -> Interval:
    """As `times_faster` for what both take beyond a base: the ratio of differences of medians, with its interval."""
    ours, theirs, floor = paired(row, rival, base)
    return excess_ratio_interval(theirs, ours, floor)


def cells(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Rows that took turns together, by system, in the order of their first row."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(json.dumps([row.bench, row.where], sort_keys=True), {})[row.system] = row
    return list(found.values())


class Log:
    """Rows as JSON lines; what was there before is replaced when it is made.

    Raises
    ------
    UserError
        If the file cannot be written.
    """

    def __init__(self, path: Path, machine: Mapping[str, Any]) -> None:
        self.path, self.rows = path, list[Row]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"machine": machine}, default=str) + "\n")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror or error})") from error

    def add(self, row: Row) -> None:
        """Keep a row; on disk when this returns."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")


def read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows in a file.

    Raises
    ------
    UserError
        If it is no such file.
    """
    try:
        first, *lines = path.read_text().splitlines()
        return json.loads(first)["machine"], [Row(**json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no file of `mixkvq bench` ({error})") from error
