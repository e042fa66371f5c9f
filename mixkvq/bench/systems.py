"""What ``mixkvq bench kernels`` compares: data in enough copies to be out of cache, and ways to attend to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .check import BOUNDS, PLAIN_BOUNDS, check, exact_attention
from .history import History, Records
from .machine import copies_to_pass, resident
from .plain import formulations, window
from .samples import repeated
from .turns import Case

_IN_CACHE = 4
"""Data of less than this part of the last-level cache are also timed in cache."""


@dataclass
class Data:
    """One layer's keys and values, in copies that are read in turn.

    Attributes
    ----------
    copies : list
        `History`, or (k, v, `ops.Layer`).
    nbytes : int
        Of one copy.
    cache : int
        Bytes of the last-level cache.
    """

    copies: list[Any]
    nbytes: int
    cache: int
    _turn: Iterator[Any] = field(init=False)

    def __post_init__(self) -> None:
        self._turn = cycle(self.copies)

    def next(self) -> Any:
        """The copy that was read longest ago."""
        return next(self._turn)

    @property
    def facts(self) -> dict[str, Any]:
        """Bytes, copies, and whether they may be in cache when they are read."""
        passed = len(self.copies) * self.nbytes
        return {"nbytes": self.nbytes, "copies": len(self.copies), "resident": resident(passed, self.cache)}

    @classmethod
    def packed(cls, records: Records, tokens: int, cache: int, memory: int) -> Data:
        """Packed records and an exact window."""
        first = records.history(tokens)
        number = copies_to_pass(first.nbytes, cache, memory)
        return cls([first, *(records.history(tokens) for _ in range(number - 1))], first.nbytes, cache)

    @classmethod
    def plain(cls, states: tuple[Tensor, Tensor], dtype: torch.dtype, tokens: int, cache: int, memory: int) -> Data:
        """Keys and values as they are."""
        k, v = (repeated(x.to(dtype), tokens) for x in states)
        nbytes = k.nbytes + v.nbytes
        pairs = [(k, v), *((k.clone(), v.clone()) for _ in range(copies_to_pass(nbytes, cache, memory) - 1))]
        return cls([(*pair, window(*pair)) for pair in pairs], nbytes, cache)


@dataclass(frozen=True)
class System:
    """A way to attend to some data.

    Attributes
    ----------
    name : str
    data : Data
    attend : callable
        (copy, q [1, Q, 1, D]) -> the output.
    dtype : torch.dtype
        Of queries.
    bound : float
        Relative error that is allowed.
    facts : dict
        For the row.
    """

    name: str
    data: Data
    attend: Callable[[Any, Tensor], Tensor]
    dtype: torch.dtype
    bound: float
    facts: dict[str, Any]

    def case(self, q: Tensor) -> Case:
        """To be timed, on the next copy every time."""
        query = q.to(self.dtype)
        return Case(self.name, lambda: self.attend(self.data.next(), query))

    def case_in_cache(self, q: Tensor) -> Case | None:
        """To be timed on one copy that was read just before, if it fits into the cache."""
        if _IN_CACHE * self.data.nbytes > self.data.cache:
            return None
        query, copy = q.to(self.dtype), self.data.copies[0]

        def call() -> Tensor:
            return self.attend(copy, query)

        return Case(f"{self.name}, in cache", call, before=call)


def packed_systems(preset: str, precisions: Sequence[str], data: Data) -> Iterator[System]:
    """Our attention over packed records, in each precision."""
    for precision in precisions:

        def run(history: History, q: Tensor, precision: str = precision) -> Tensor:
            return ops.attend(history.layer, q, precision=precision)

        facts = {"role": "packed", "preset": preset, "precision": precision}
        yield System(f"{preset}, {precision}", data, run, torch.float32, BOUNDS[precision], facts)


def plain_systems(short: str, dtype: torch.dtype, group: int, data: Data) -> Iterator[System]:
    """Attention over keys and values as they are: torch's formulations, and the core's own kernel."""

    def core(copy: tuple[Tensor, Tensor, ops.Layer], q: Tensor) -> Tensor:
        return ops.attend(copy[2], q, precision="exact")

    bound = PLAIN_BOUNDS[dtype]
    yield System(f"core {short}", data, core, dtype, bound, {"role": "core", "dtype": short})
    for name, function in formulations(group).items():

        def run(copy: tuple[Tensor, Tensor, ops.Layer], q: Tensor, function: Any = function) -> Tensor:
            result: Tensor = function(q, copy[0], copy[1])
            return result

        facts = {"role": "torch", "dtype": short, "formulation": name}
        yield System(f"torch {short} {name}", data, run, dtype, bound, facts)


def errors(systems: Sequence[System], q: Tensor) -> dict[str, float]:
    """Relative error of every system against float64 attention on what its first copy holds.

    Raises
    ------
    WrongResult
        If one is above its bound.
    """
    truths: dict[int, tuple[Tensor, Tensor]] = {}
    found = {}
    for system in systems:
        copy, query = system.data.copies[0], q.to(system.dtype)
        if id(system.data) not in truths:
            k, v = copy.decoded() if isinstance(copy, History) else copy[:2]
            truths[id(system.data)] = query, exact_attention(query, k, v)
        found[system.name] = check(system.name, system.attend(copy, query), truths[id(system.data)][1], system.bound)
    return found
