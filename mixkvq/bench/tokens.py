"""``mixkvq bench tokens``: reading a prompt and decoding token by token, on a real model and real text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import UserError
from ..eval.memory import cache_nbytes
from ..eval.schemes import Scheme
from ..eval.stream import Emit
from ..eval.texts import windows
from .decoder import Decoder
from .rows import Log, Row
from .turns import CLOCKS, Case, Taken, Times, take_turns

BENCH = "tokens"
DOMAIN = "prose"
PREFILL, DECODE, FLUSH = "prefill", "decode", "flush"
"""Phases: reading the prompt; decoding, all caches in turn; decoding with one cache until it has packed often."""

_WARM_UP = 2
"""Tokens that `take_turns` decodes before it times."""

_BLOCK = 128
"""Tokens after which every preset packs again."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    schemes: Sequence[Scheme]
    tokens: Sequence[int] = (64, 256, 1024, 2048, 4096, 8192)
    """Of the prompts; one that leaves the model no room for the steps is cut."""
    steps: int = 64
    """Decoded behind each prompt, all caches in turn."""
    flush_tokens: int = 4096
    """The prompt behind which steps that pack are waited for."""
    flushes: int = 8
    """How many."""
    repeats: int = 5
    """Most readings of a prompt."""
    seconds: float = 60.0
    """A prompt is not read again when reading it took that long in all."""
    threads: int = 2
    clock: str = "wall"
    """One of `turns.CLOCKS`."""

    @property
    def parts(self) -> int:
        """Of the work, for a progress bar."""
        packed = sum(scheme.kind == "packed" for scheme in self.schemes)
        return (self.repeats + 1) * len(self.tokens) + self.flushes * packed * (self.flush_tokens in self.tokens)


def prompts(plan: Plan, limit: int | None) -> list[int]:
    """Lengths of the prompts for a model that reads ``limit`` tokens.

    Raises
    ------
    UserError
        If one is longer than that.
    """
    if limit is None:
        return list(plan.tokens)
    if max(plan.tokens) > limit:
        raise UserError(f"--tokens is {max(plan.tokens)}, must be at most {limit}: the model reads no more")
    return [min(tokens, limit - plan.steps - _WARM_UP) for tokens in plan.tokens]


def run(plan: Plan, model: Any, tokenizer: Any, log: Log, emit: Emit) -> None:
    """Time everything; rows go to ``log``, progress to ``emit`` as ("chunk", (parts done, of all))."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    lengths = prompts(plan, limit)
    ids = _text(plan, tokenizer, lengths, limit)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    threads, done = torch.get_num_threads(), 0
    torch.set_num_threads(plan.threads)

    def part() -> None:
        nonlocal done
        done += 1
        emit("chunk", (done, plan.parts))

    try:
        with torch.no_grad():
            model(ids[:, :16], use_cache=False)  # weights are mapped from their file: brings them into memory
        for wanted, tokens in zip(plan.tokens, lengths, strict=True):
            where = {"tokens": tokens, "threads": plan.threads}
            decoders = _prefill(plan, model, ids, where, log, part)
            _decode(plan, decoders, where, weights, log)
            part()
            for scheme in plan.schemes if wanted == plan.flush_tokens and plan.flushes else ():
                if scheme.kind == "packed":
                    _flush(plan, scheme.name, decoders[scheme.name], where, log, part)
            emit("chunk", (done, plan.parts))
    finally:
        torch.set_num_threads(threads)


def _text(plan: Plan, tokenizer: Any, lengths: Sequence[int], limit: int | None) -> torch.Tensor:
    """All tokens that are fed, int64 [1, n]."""
    longest = max(lengths) + plan.steps + _WARM_UP
    if plan.flush_tokens in plan.tokens and plan.flushes:
        longest = max(longest, plan.flush_tokens + plan.steps + _WARM_UP + _BLOCK * (plan.flushes + 1))
    return torch.tensor([windows(tokenizer, DOMAIN, 1, min(longest, limit or longest))[0].ids])


def _prefill(
    plan: Plan, model: Any, ids: torch.Tensor, where: dict[str, Any], log: Log, part: Callable[[], None]
) -> dict[str, Decoder]:
    """Read a prompt into a fresh cache of each scheme, again and again; the last caches, by name of their scheme."""
    decoders: dict[str, Decoder] = {}

    def reading(scheme: Scheme) -> Case:
        def renew() -> None:
            decoders[scheme.name] = Decoder(model, scheme.cache(model), ids)

        return Case(scheme.name, lambda: decoders[scheme.name].read(where["tokens"]), before=renew)

    cases = [reading(scheme) for scheme in plan.schemes]
    taken = {case.name: Taken([]) for case in cases}
    begin, clock = time.perf_counter(), CLOCKS[plan.clock]
    for i in range(plan.repeats):
        if not i or time.perf_counter() - begin < plan.seconds:
            order = cases[:: -1 if i % 2 else 1]
            found = take_turns(order, 0.0, rounds=1, fewest=1, warm_up=False, shuffle=False, clock=clock)
            for name, turn in found.items():
                taken[name].seconds += turn.seconds
                taken[name].preempted += turn.preempted
        part()
    for scheme in plan.schemes:
        turns = taken[scheme.name]
        facts = {"kind": scheme.kind, "preempted": turns.preempted}
        log.add(Row(BENCH, {**where, "phase": PREFILL}, scheme.name, turns.seconds, facts))
    return decoders


def _decode(plan: Plan, decoders: dict[str, Decoder], where: dict[str, Any], weights: int, log: Log) -> None:
    """Single steps, the same tokens for all caches."""
    cases = [Case(name, decoder.step, before=decoder.count) for name, decoder in decoders.items()]
    taken = take_turns(cases, 0.0, rounds=plan.steps, fewest=plan.steps, clock=CLOCKS[plan.clock])
    for scheme in plan.schemes:
        decoder = decoders[scheme.name]
        decoder.count()
        facts = {"kind": scheme.kind, "nbytes": cache_nbytes(decoder.cache), "weights": weights}
        facts |= {"flushed": decoder.flushed(), "preempted": taken[scheme.name].preempted}
        log.add(Row(BENCH, {**where, "phase": DECODE}, scheme.name, taken[scheme.name].seconds, facts))


def _flush(plan: Plan, name: str, decoder: Decoder, where: dict[str, Any], log: Log, part: Callable[[], None]) -> None:
    """Steps of one cache until it has packed ``plan.flushes`` times, or the text ends."""
    decoder.blocks.clear()
    decoder.count()
    times, clock = Times(), CLOCKS[plan.clock]
    while len(decoder.flushed()) < plan.flushes and decoder.position < decoder.ids.shape[1]:
        begin = clock()
        decoder.step()
        times.append(clock() - begin)
        decoder.count()
        if decoder.blocks[-1] > decoder.blocks[-2]:
            part()
    facts = {"kind": "packed", "flushed": decoder.flushed()}
    log.add(Row(BENCH, {**where, "phase": FLUSH}, name, times, facts))
