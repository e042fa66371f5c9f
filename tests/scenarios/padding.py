"""A left-padded row of a batch is what it is alone: padding enters neither statistics nor ranges, nor attention.

Lossless runs cannot show this. The models themselves compute a padded row only up to rounding as they do alone, which
may turn a code over, and changes the last bits of exact channels; hence the bounds.
"""

from __future__ import annotations

import functools

import pytest
import torch
from families import FAMILIES
from transformers.cache_utils import DynamicLayer

from mixkvq import reasons

from .case import Case, scenario
from .judging import relative_error

ROUNDING = 1e-4
"""Relative error of logits, of decoded keys and values: several times what float32 models show (1e-5)."""
METADATA = 2e-3
"""What another rounding of a group's scale or offset moves, in units of the largest value: two roundings of float16."""
TURNED = 1e-3
"""Share of a layer's decoded elements that may be off by more: codes that were turned over."""

LENGTHS = [100, 69]
"""Of the prompts: both rows pack blocks, at columns that differ."""


class Forced:
    """A logits processor that takes the tokens 3, 4, 5, ..., whatever the logits."""

    def __init__(self) -> None:
        self.token = 2

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.token += 1
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.token] = 0
        return forced


STEPS = 24


def _logits(case: Case, inputs: dict[str, torch.Tensor], cache) -> torch.Tensor:
    """Logits [batch, steps, vocabulary]."""
    return torch.stack(case.generate(inputs, cache, STEPS, logits_processor=[Forced()]).logits, 1)


def _row(case: Case, inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row without its padding."""
    real = inputs[case.mask][row].bool()
    return {
        name: t[row : row + 1] if name not in (case.ids, case.mask) else t[row : row + 1, real]
        for name, t in inputs.items()
    }


@functools.lru_cache(maxsize=8)
def _alike(name: str, attention: str, dtype: torch.dtype) -> bool:
    """Whether the model itself computes the same logits, and the same keys, for a padded row and for the row alone."""
    case = Case(FAMILIES[name], attention, dtype)
    inputs, batch = case.inputs(LENGTHS), case.stock()
    together = _logits(case, inputs, batch)
    for row in range(len(LENGTHS)):
        cache = case.stock()
        logits = _logits(case, _row(case, inputs, row), cache)[0]
        if not float(relative_error(together[row], logits).max()) < ROUNDING:
            return False
        for padded, own in zip(case.ours(batch).layers, case.ours(cache).layers, strict=True):
            if isinstance(own, DynamicLayer) and own.is_initialized:
                keys = padded.keys[row, :, -own.keys.shape[2] :]
                if not float((keys - own.keys[0]).abs().max()) < ROUNDING * float(keys.abs().max()):
                    return False
    return True


def _padded_is_alone(case: Case, preset: str) -> None:
    if not _alike(case.family.name, case.attention, case.dtype):
        pytest.skip("the model itself gives a padded row other logits or positions than the row alone")
    inputs = case.inputs(LENGTHS)
    batch = case.quantized(preset, precision="exact")
    together = _logits(case, inputs, batch)
    layers = [layer for layer in case.ours(batch).layers if getattr(layer, "store", None) is not None]
    if any(layer.reason is reasons.INVISIBLE for layer in layers):
        pytest.skip("the cache never sees the masks of this family: padding is stored as tokens are")
    for row in range(len(LENGTHS)):
        alone = case.quantized(preset, precision="exact")
        logits = _logits(case, _row(case, inputs, row), alone)[0]
        equal = _assert_same_records(case.ours(batch), case.ours(alone), row)
        assert float(relative_error(logits, together[row]).max()) < (ROUNDING if equal else 0.1)


def _assert_same_records(batch, alone, row: int) -> bool:
    """A row has the same blocks, of the same sizes, that decode to the same; says whether to rounding."""
    equal = True
    for padded, own in zip(batch.layers, alone.layers, strict=True):
        assert type(padded) is type(own)
        if getattr(own, "store", None) is None:
            continue
        start, blocks = int(padded.store.start[row]), int(own.store.blocks[0])
        assert (start, int(own.store.start[0])) == (LENGTHS[0] - LENGTHS[row], 0)
        assert blocks == int(padded.store.blocks[row]) >= 1
        assert int(own.store.exact[0]) == int(padded.store.exact[row])
        for head in range(own.store.k.shape[1]):
            for block in range(blocks):
                assert len(padded.store.record(row, head, block)) == len(own.store.record(0, head, block))
        for a, b in zip(_statistics(own), _statistics(padded), strict=True):
            assert torch.allclose(a[0].float(), b[row].float(), rtol=1e-3, atol=1e-5)
        here, there = torch.cat(own.store.read(), 1)[0], torch.cat(padded.store.read(), 1)[row, :, start:]
        gap = (here - there).abs() / here.abs().max()
        assert float((gap > METADATA).double().mean()) < TURNED
        equal &= bool((gap < ROUNDING).all())
    return equal


def _statistics(layer) -> list[torch.Tensor]:
    """What is known of queries and keys, row by row."""
    store = layer.store
    return [t for t in (store.queries.importance(), store.queries.count, store.mu, store.has_mu) if t is not None]


def _register(preset: str) -> None:
    @scenario(f"padded_rows_are_as_alone_{preset.replace('-', '_')}")
    def padded_rows_are_as_alone(case: Case) -> None:
        _padded_is_alone(case, preset)


for _preset in ("default", "kivi-2", "paper", "compact"):
    _register(_preset)
