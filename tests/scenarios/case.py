"""`Case`: a family with one of its attention implementations; `scenario`: the registry of what is done with it."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import models
import pytest
import torch
from families import Family
from family_fields import VOCABULARY
from models import prompts, tiny
from transformers import DynamicCache, EncoderDecoderCache

from mixkvq import MixKVQCache

from . import judging

SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
"""Fields of a quantized cache, so that short prompts are packed."""
EIGHT_BITS = {"key_patterns": {8: 64}, "value_bits": 8, "precision": "exact"}
"""Fields of a cache that is quantized, but finely."""


@dataclass
class Case:
    """A family with one of its attention implementations, and how scenarios use it."""

    family: Family
    attention: str
    dtype: torch.dtype = torch.float32
    caches: tuple[MixKVQCache, ...] = ()

    @property
    def seen(self) -> str:
        """Path of every layer as `report` of the caches of the last `compare` gives it, or "" before there is one.

        Caches that differ are all named.
        """
        return " or ".join(dict.fromkeys(" ".join(models.paths(cache)) for cache in self.caches))

    @property
    def model(self) -> Any:
        """The tiny model."""
        return tiny(self.family.name, self.attention, self.dtype)

    def another_model(self) -> Any:
        """A model of the same family with other weights."""
        return tiny(self.family.name, self.attention, self.dtype, seed=1)

    # ---- caches ----------------------------------------------------------------------------------------------------
    def stock(self) -> Any:
        """The cache that transformers would use."""
        return self._pair(DynamicCache(config=self.model.config.get_text_config(decoder=True)))

    def lossless(self, **fields: Any) -> Any:
        """Ours, that changes nothing."""
        return self._pair(models.lossless(**{**self._told, **fields}))

    def quantized(self, preset: str = "default", **fields: Any) -> Any:
        """Ours, quantized, with short blocks."""
        return self._pair(MixKVQCache(preset, **{**self._told, **SHORT, **fields}))

    @property
    def _told(self) -> dict[str, Any]:
        return {"config": self.model.config} if self.family.told else {}

    def _pair(self, cache: Any) -> Any:
        return EncoderDecoderCache(cache, DynamicCache()) if self.family.encoder else cache

    @staticmethod
    def ours(cache: Any) -> MixKVQCache:
        """The part of a cache that is ours."""
        return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache

    def reader(self, cache: Any, lengths: Sequence[int] = (), batch: int = 1) -> Reader:
        """See `Reader`."""
        return Reader(self, cache, lengths, batch)

    # ---- running ---------------------------------------------------------------------------------------------------
    @property
    def ids(self) -> str:
        """Name of the tokens among `inputs`."""
        return "decoder_input_ids" if self.family.encoder else "input_ids"

    @property
    def mask(self) -> str:
        """Name of their mask."""
        return "decoder_attention_mask" if self.family.encoder else "attention_mask"

    def inputs(self, lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
        """Arguments of `generate`: prompts of these lengths, padded on the left."""
        inputs = prompts(lengths, seed)
        if not self.family.encoder:
            return inputs
        for ids, length in zip(inputs["input_ids"], lengths, strict=True):
            ids[-length] = self._start  # else generate puts it before the padding
        decoder = {f"decoder_{name}": tensor for name, tensor in inputs.items()}
        return {**self.encoded(len(lengths), seed + 100), **decoder}

    @property
    def _start(self) -> int:
        """The token that every text of a decoder begins with."""
        start = self.model.generation_config.decoder_start_token_id
        return self.model.generation_config.bos_token_id if start is None else start

    def encoded(self, batch: int, seed: int = 101) -> dict[str, torch.Tensor]:
        """What the encoder reads."""
        if self.family.encoder == "input_ids":
            return prompts([24] * batch, seed)
        config = self.model.config
        shape = {
            "input_features": lambda: (config.num_mel_bins, 2 * config.max_source_positions),  # a spectrogram
            "input_values": lambda: (12000,),  # sound
        }[self.family.encoder]()
        return {self.family.encoder: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))}

    def generate(self, inputs: dict[str, torch.Tensor], cache: Any, new_tokens: int = 20, **options: Any) -> Any:
        """Generation, greedy unless the options say otherwise, with all logits."""
        return models.generate(self.model, inputs, cache, new_tokens, **options)

    def forward(
        self, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, *, model: Any = None, **options: Any
    ) -> torch.Tensor:
        """Logits of a forward pass (of the decoder)."""
        model = self.model if model is None else model
        inner = getattr(model, "model", None)
        if hasattr(inner, "rope_deltas"):  # Qwen VL: after `generate`, it takes no new tokens with the whole mask
            inner.rope_deltas = None
        if self.family.encoder:
            options |= {**self.encoded(len(ids)), "decoder_input_ids": ids, "decoder_attention_mask": mask}
            ids = mask = None
        return models.forward(model, cache, ids, mask, **options)

    # ---- judging ---------------------------------------------------------------------------------------------------
    def compare(
        self, run: Callable[[Any], Any], tolerance: float = 1e-5, *, books: bool = True, **fields: Any
    ) -> tuple[MixKVQCache, MixKVQCache, MixKVQCache]:
        """Run with the stock cache, with ours that changes nothing, with 3 and with 8 bits, and judge all of them.

        Parameters
        ----------
        run : function of a cache
            Returns what `generate` gives, or logits, or a list of such.
        tolerance : float
            How far lossless logits may be off, in units of their range.
        books : bool
            Whether the caches' own accounts are compared too.
        **fields
            For all of our caches.

        Returns
        -------
        Our caches after it: lossless, default, 8 bits; also kept as ``caches``.
        """
        stock = self.stock()
        try:
            want = run(stock)
        except Exception as error:
            pytest.skip(f"DynamicCache fails too: {self._shortened(error)}")
        lossless, default = self.lossless(**fields), self.quantized(**fields)
        fine = self.quantized(**EIGHT_BITS | fields)
        self.caches = self.ours(lossless), self.ours(default), self.ours(fine)
        judging.assert_same(want, run(lossless), tolerance, lambda: self._truth(run))
        judging.assert_sane(want, run(default), run(fine))
        for cache in (lossless, default, fine) if books else ():
            judging.assert_same_books(stock, cache)
        for cache, rounding in ((lossless, tolerance), (default, judging.PRECISION), (fine, tolerance)):
            judging.assert_reads_what_it_holds(self, cache, max(rounding, tolerance))
        return self.caches

    def _truth(self, run: Callable[[Any], Any]) -> Any:
        """What it returns with the stock cache and the same weights in float64."""
        dtype, self.dtype = self.dtype, torch.float64
        try:
            return run(self.stock())
        finally:
            self.dtype = dtype

    def _shortened(self, error: Exception) -> str:
        """The first words of an error, without the family's name and the insides of printed modules."""
        text = re.sub(r"\(\n.*?\n\)", "(...)", f"{type(error).__name__}: {error}".strip(), flags=re.DOTALL)
        text = text.splitlines()[0].replace(type(self.model).__name__, "this model")
        text = re.sub(rf"\b{self.family.config}(?=[A-Z])", "", text)
        return textwrap.shorten(text, 100, placeholder=" ...")


class Reader:
    """Feeds random tokens to a cache, keeps the attention mask, and collects the logits of all real tokens.

    Parameters
    ----------
    case : Case
    cache : Any
    lengths : sequence of int
        Of the prompts that are read at once, padded on the left; none: nothing is read yet.
    batch : int
        Rows, if there are no prompts.
    """

    def __init__(self, case: Case, cache: Any, lengths: Sequence[int] = (), batch: int = 1) -> None:
        self.case, self.cache, self.logits = case, cache, []
        self._generator = torch.Generator().manual_seed(11)
        self.mask = torch.ones(len(lengths) or batch, 0, dtype=torch.long)
        if lengths:
            self.read(max(lengths), prompts(lengths)["attention_mask"])

    def read(
        self,
        tokens: int,
        mask: torch.Tensor | None = None,
        *,
        own_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> None:
        """Read so many tokens; ``mask`` [batch, tokens] says which are real, ``own_mask`` replaces the model's."""
        batch = len(self.mask)
        ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=self._generator)
        mask = torch.ones(batch, tokens, dtype=torch.long) if mask is None else mask
        self.mask = torch.cat([self.mask, mask], 1)
        given = self.mask if own_mask is None else own_mask
        self.logits.append(self.case.forward(self.cache, ids, given, **options)[mask.bool()])

    def steps(self, number: int) -> None:
        """Read token by token."""
        for _ in range(number):
            self.read(1)

    def crop(self, tokens: int) -> None:
        """Take the last tokens back."""
        self.cache.crop(-tokens)
        self.mask = self.mask[:, : self.mask.shape[1] - tokens]

    def keep_rows(self, rows: list[int]) -> None:
        """The cache was told to keep these rows."""
        self.mask = self.mask[rows]

    def copy(self, how: Callable[[Any], Any] = copy.deepcopy) -> Reader:
        """A reader of the same tokens to come, without logits, on a copy of the cache."""
        other = Reader(self.case, how(self.cache))
        other.mask = self.mask
        other._generator.set_state(self._generator.get_state())
        return other


# ---- the registry --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Scenario:
    """One thing that people do.

    Attributes
    ----------
    function : function of a case
    decoder_only : str
        Why models with an encoder cannot do it, if so.
    families : tuple of str or None
        Where it does not depend on the family, the only ones on which it is tried.
    slow : bool
        Whether it is left out of the default test run everywhere.
    """

    function: Callable[[Case], None]
    decoder_only: str = ""
    families: tuple[str, ...] | None = None
    slow: bool = False

    def __call__(self, case: Case) -> None:
        if self.decoder_only and case.family.encoder:
            pytest.skip(self.decoder_only)
        self.function(case)


SCENARIOS: dict[str, Scenario] = {}
"""All scenarios by name."""


def scenario(
    name: str = "", *, decoder_only: str = "", families: tuple[str, ...] | None = None, slow: bool = False
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Register a scenario.

    Parameters
    ----------
    name : str
        Default: the function's.
    decoder_only, families, slow
        As in `Scenario`.
    """

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        SCENARIOS[name or function.__name__] = Scenario(function, decoder_only, families, slow)
        return function

    return register
