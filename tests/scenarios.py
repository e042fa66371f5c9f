"""What people do with a cache. Every scenario is tried on every family by `test_matrix.py`.

A scenario runs something three times: with `DynamicCache`, with our ``lossless`` preset, which must give the same, and
with ``default``, which must give something finite and sane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from families import Family
from models import assert_same_tokens, prompts, relative_gap, tiny
from transformers import DynamicCache, EncoderDecoderCache

from mixkvq import MixKVQCache

SCENARIOS: dict[str, Callable[[Case], None]] = {}
"""All scenarios by name."""


def scenario(function: Callable[[Case], None]) -> Callable[[Case], None]:
    """Register a scenario under its function's name."""
    SCENARIOS[function.__name__] = function
    return function


@dataclass
class Case:
    """A family with one of its attention implementations, and how scenarios use it."""

    family: Family
    attention: str
    dtype: torch.dtype = torch.float32

    @property
    def model(self) -> Any:
        """The tiny model."""
        return tiny(self.family.name, self.attention, self.dtype)

    # ---- caches ----------------------------------------------------------------------------------------------------
    def stock(self) -> Any:
        """The cache that transformers would use."""
        return self._pair(DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    def lossless(self, **fields: Any) -> Any:
        """Ours, that changes nothing."""
        return self._pair(models.lossless(**fields))

    def default(self, **fields: Any) -> Any:
        """Ours, quantized, with short blocks."""
        return self._pair(MixKVQCache(block_length=32, residual_length=32, key_group_size=32, **fields))

    def _pair(self, cache: Any) -> Any:
        return EncoderDecoderCache(cache, DynamicCache()) if self.family.encoder else cache

    @staticmethod
    def ours(cache: Any) -> MixKVQCache:
        """The part of a cache that is ours."""
        return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    # ---- running ---------------------------------------------------------------------------------------------------
    def inputs(self, lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
        """Arguments of `generate`: prompts of these lengths, padded on the left."""
        inputs = prompts(lengths, seed)
        if not self.family.encoder:
            return inputs
        return {
            **prompts([24] * len(lengths), seed + 100),
            "decoder_input_ids": inputs["input_ids"],
            "decoder_attention_mask": inputs["attention_mask"],
        }

    def generate(self, inputs: dict[str, torch.Tensor], cache: Any, new_tokens: int = 24, **options: Any) -> Any:
        """Greedy generation with all logits."""
        return models.generate(self.model, inputs, cache, new_tokens, **options)

    def forward(self, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """Logits of a forward pass (of the decoder)."""
        if self.family.encoder:
            options |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
            return models.forward(self.model, cache, prompts([24] * len(ids), 101)["input_ids"], None, **options)
        return models.forward(self.model, cache, ids, mask, **options)

    # ---- judging ---------------------------------------------------------------------------------------------------
    def compare(self, run: Callable[[Any], Any]) -> tuple[MixKVQCache, MixKVQCache]:
        """Run with all three caches and judge; the caches come back.

        Parameters
        ----------
        run : function of a cache
            Returns what `generate` gives, or logits.
        """
        try:
            want = run(self.stock())
        except Exception as error:
            pytest.skip(f"DynamicCache fails too: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
        caches = self.lossless(), self.default()
        assert_same(want, run(caches[0]))
        assert_sane(want, run(caches[1]))
        return self.ours(caches[0]), self.ours(caches[1])


def assert_same(want: Any, got: Any) -> None:
    """The same tokens, or logits that differ by rounding."""
    if hasattr(want, "sequences"):
        assert_same_tokens(want, got)
    else:
        assert relative_gap(got, want) < 1e-5


def assert_sane(want: Any, got: Any) -> None:
    """Finite logits of the right shape, not far from the exact ones where nothing has diverged yet."""
    if hasattr(want, "sequences"):
        assert got.sequences.shape == want.sequences.shape
        want, got = want.logits[0], got.logits[0]
    assert got.shape == want.shape and bool(got.isfinite().all())
    assert float((got - want).norm() / want.norm()) < 1.0


# ---- generating ----------------------------------------------------------------------------------------------------
@scenario
def greedy(case: Case) -> None:
    caches = case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache))
    for cache in caches:
        assert tuple(models.paths(cache)) == case.family.paths


@scenario
def beams(case: Case) -> None:
    case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, num_beams=4, num_return_sequences=3))


@scenario
def prefill_in_chunks(case: Case) -> None:
    case.compare(lambda cache: case.generate(case.inputs([90, 53]), cache, prefill_chunk_size=33))
