"""``mixkvq bench kernels``: attention of one decode step over packed records, against unpacked keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import MixKVQConfig
from ..eval.stream import Emit
from .history import Records
from .machine import last_level_cache
from .rows import Log, Row
from .samples import Sampler
from .systems import Data, System, errors, packed_systems, plain_systems
from .turns import CLOCKS, FEWEST, ROUNDS, take_turns

BENCH = "kernels"
MEMORY = 6 << 30
"""Bytes that the copies of all data may take together."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS = 8
_SAMPLE = 2048


@dataclass(frozen=True)
class Grid:
    """What to measure: all combinations of ``head_dims`` to ``threads``."""

    presets: Sequence[str] = ("compact", "default")
    precisions: Sequence[str] = ("default", "exact")
    head_dims: Sequence[int] = (64, 128)
    tokens: Sequence[int] = (256, 1024, 4096, 32768, 131072)
    groups: Sequence[int] = (1, 4, 8)
    """Query heads per KV head."""
    threads: Sequence[int] = (1, 2)
    seconds: float = 2.0
    """For timing each combination; more where the slowest case needs it for ``fewest`` turns."""
    rounds: int = ROUNDS
    fewest: int = FEWEST
    clock: str = "wall"
    """One of `turns.CLOCKS`."""
    heads: int = HEADS
    """KV heads."""

    @property
    def cells(self) -> int:
        """Combinations."""
        return len(self.head_dims) * len(self.tokens) * len(self.groups) * len(self.threads)


def run(grid: Grid, log: Log, emit: Emit) -> None:
    """Check and time everything; rows go to ``log``, progress to ``emit`` as ("chunk", (rounds done, of all)).

    Raises
    ------
    WrongResult
        If something computes other than float64 attention, before it is timed.
    """
    threads, done = torch.get_num_threads(), 0
    try:
        for head_dim in grid.head_dims:
            sampler = Sampler(head_dim, grid.heads)
            states = sampler.states(_SAMPLE)
            records = {name: Records.pack(MixKVQConfig.preset(name), sampler) for name in grid.presets}
            for tokens in grid.tokens:
                done = _length(grid, sampler, _data(grid, records, states, tokens), tokens, log, emit, done)
    finally:
        torch.set_num_threads(threads)


def _data(
    grid: Grid, records: dict[str, Records], states: tuple[torch.Tensor, torch.Tensor], tokens: int
) -> dict[str, Data]:
    """All that attention reads at one length."""
    cache, share = last_level_cache(), MEMORY // (len(records) + len(DTYPES))
    packed = {name: Data.packed(x, tokens, cache, share) for name, x in records.items()}
    return {**packed, **{name: Data.plain(states, dtype, tokens, cache, share) for name, dtype in DTYPES.items()}}


def _length(grid: Grid, sampler: Sampler, data: dict[str, Data], tokens: int, log: Log, emit: Emit, done: int) -> int:
    """All groups and threads at one length; returns how many rounds are done."""
    for group in grid.groups:
        systems: list[System] = []
        for preset in grid.presets:
            systems += packed_systems(preset, grid.precisions, data[preset])
        for short, dtype in DTYPES.items():
            systems += plain_systems(short, dtype, group, data[short])
        q = sampler.queries(group)
        error = errors(systems, q)
        for threads in grid.threads:
            torch.set_num_threads(threads)
            cases = {system.name: (system, system.case(q), False) for system in systems}
            for system in systems:
                if system.facts["role"] == "packed" and (warm := system.case_in_cache(q)):
                    cases[warm.name] = system, warm, True
            begun = done

            def passed(rounds: int, begun: int = begun) -> None:
                emit("chunk", (begun + rounds, grid.cells * grid.rounds))

            taken = take_turns(
                [case for _, case, _ in cases.values()],
                grid.seconds,
                rounds=grid.rounds,
                fewest=grid.fewest,
                clock=CLOCKS[grid.clock],
                passed=passed,
            )
            done += grid.rounds
            where = {"head_dim": sampler.head_dim, "tokens": tokens, "group": group, "threads": threads}
            for name, (system, _, warm_case) in cases.items():
                facts = {**system.facts, **system.data.facts, "heads": grid.heads, "error": error[system.name]}
                if warm_case:
                    facts |= {"resident": True, "in_cache": True}
                facts["preempted"] = taken[name].preempted
                log.add(Row(BENCH, where, name, taken[name].seconds, facts))
    return done
