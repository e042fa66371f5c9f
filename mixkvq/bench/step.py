"""``mixkvq bench step``: a whole decode step of a small Llama with one cache or another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..compat import cache_argument
from ..errors import UserError
from ..eval.memory import cache_nbytes
from ..eval.schemes import Scheme, parse_scheme
from ..eval.stream import Emit
from .machine import Evictor, last_level_cache
from .rows import Log, Row
from .tiny import Replay, fill, states_of, tiny_llama
from .turns import CLOCKS, FEWEST, ROUNDS, Case, take_turns

BENCH = "step"
EAGER = "exact-eager"
"""`DynamicCache` with attn_implementation="eager"."""

EMPTY = "empty history"
"""`DynamicCache` that begins with one token: what the rest of the model costs."""

STEP, ATTENTION = "step", "update + attention"
PARTS = STEP, ATTENTION
"""What is timed: a forward pass; or of it only what touches the cache, layer by layer."""

SCHEMES = ("compact", "default", "exact", EAGER, "hqq-2", "quanto-2")
_OPTIONAL = ("hqq", "quanto")


@dataclass(frozen=True)
class Grid:
    """What to measure: all combinations of ``head_dims`` to ``threads``."""

    schemes: Sequence[Scheme]
    head_dims: Sequence[int] = (64, 128)
    groups: Sequence[int] = (1, 4, 8)
    tokens: Sequence[int] = (1024, 4096, 32768)
    threads: Sequence[int] = (1, 2)
    slow_tokens: int = 4096
    """Longest history for eager attention and transformers' QuantizedCache, which take long."""
    layers: int = 2
    heads: int = 8
    """KV heads."""
    seconds: float = 2.0
    rounds: int = ROUNDS
    fewest: int = FEWEST
    clock: str = "wall"
    """One of `turns.CLOCKS`."""

    @property
    def cells(self) -> int:
        """Combinations."""
        return len(self.head_dims) * len(self.tokens) * len(self.groups) * len(self.threads)

    def schemes_at(self, tokens: int) -> list[Scheme]:
        """Those that are measured at this length."""
        return [s for s in self.schemes if tokens <= self.slow_tokens or not _slow(s)]


def _slow(scheme: Scheme) -> bool:
    return scheme.name == EAGER or scheme.kind == "transformers"


def parse(names: Sequence[str], *, skip: bool, say: Callable[[str], None]) -> list[Scheme]:
    """Schemes by name; see `mixkvq.eval.schemes`, and `EAGER`.

    Parameters
    ----------
    names : sequence of str
    skip : bool
        Leave out back ends that are not installed, and ``say`` so.

    Raises
    ------
    UserError
        For an unknown name, or a package that is missing.
    """
    found = []
    for name in names:
        try:
            scheme = parse_scheme("exact" if name == EAGER else name)
        except UserError as error:
            if not skip or name.partition("-")[0] not in _OPTIONAL:
                raise
            say(f"left out: {error}")
            continue
        if scheme.kind == "simulated":
            raise UserError(f"scheme {name!r} is simulated: its speed says nothing")
        found.append(replace(scheme, name=name))
    return found


@dataclass(frozen=True)
class _Decoder:
    """A model with a filled cache."""

    name: str
    model: Any
    cache: Any
    facts: dict[str, Any]
    replay: Replay

    def attention(self) -> torch.Tensor:
        """What the cache does in a step: one more token for every layer, and attention, [1, 1, Q, D] of the last."""
        return self.replay(self.cache)

    def step(self) -> torch.Tensor:
        """Logits [1, 1, vocabulary] of one more token."""
        with torch.no_grad():
            logits: torch.Tensor = self.model(torch.tensor([[7]]), **cache_argument(self.cache), use_cache=True).logits
        return logits


def _decoders(grid: Grid, head_dim: int, group: int, tokens: int, states: Any) -> Iterator[_Decoder]:
    shape = head_dim, group, grid.heads, grid.layers
    model = tiny_llama(*shape, "sdpa")
    replay = Replay(model, states)
    for scheme in grid.schemes_at(tokens):
        own = tiny_llama(*shape, "eager") if scheme.name == EAGER else model
        cache = scheme.cache(own)
        fill(cache, own, states)
        facts: dict[str, Any] = {"kind": scheme.kind, "nbytes": cache_nbytes(cache)}
        if scheme.kind == "packed":
            facts["paths"] = sorted({layer.path for layer in cache.report().layers})
        yield _Decoder(scheme.name, own, cache, facts, replay if own is model else Replay(own, states))
    from transformers import DynamicCache

    empty = DynamicCache(config=model.config)
    fill(empty, model, [(k[:, :, :1], v[:, :, :1]) for k, v in states])
    yield _Decoder(EMPTY, model, empty, {"kind": "empty", "nbytes": 0}, replay)


def run(grid: Grid, log: Log, emit: Emit) -> None:
    """Time everything; rows go to ``log``, progress to ``emit`` as ("chunk", (rounds done, of all))."""
    before, done, evict = torch.get_num_threads(), 0, Evictor(last_level_cache())
    try:
        for head_dim in grid.head_dims:
            for tokens in grid.tokens:
                states = states_of(head_dim, grid.heads, grid.layers, tokens)
                for group in grid.groups:
                    decoders = list(_decoders(grid, head_dim, group, tokens, states))
                    for threads in grid.threads:
                        torch.set_num_threads(threads)
                        where = {"head_dim": head_dim, "tokens": tokens, "group": group, "threads": threads}
                        for part in PARTS:
                            for row in _rows(grid, decoders, {**where, "part": part}, evict, emit, done):
                                log.add(row)
                            done += grid.rounds
    finally:
        torch.set_num_threads(before)


def _rows(
    grid: Grid, decoders: Sequence[_Decoder], where: dict[str, Any], evict: Evictor, emit: Emit, done: int
) -> Iterator[Row]:
    """All caches at one place."""
    whole = where["part"] == STEP
    taken = take_turns(
        [Case(d.name, d.step if whole else d.attention, before=evict) for d in decoders],
        grid.seconds,
        rounds=grid.rounds,
        fewest=grid.fewest,
        clock=CLOCKS[grid.clock],
        passed=lambda rounds: emit("chunk", (done + rounds, grid.cells * len(PARTS) * grid.rounds)),
    )
    for decoder in decoders:
        found = taken[decoder.name]
        facts = {**decoder.facts, "layers": grid.layers, "preempted": found.preempted}
        yield Row(BENCH, where, decoder.name, found.seconds, facts)
