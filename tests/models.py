"""Tiny random language models of many families, and how the cache tests run them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers
from families import FAMILIES
from family_fields import VOCABULARY
from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument

torch.set_num_threads(1)  # models this small lose by more

_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


@lru_cache(maxsize=32)
def tiny(
    family: str = "llama", attention: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> Any:
    """A random model of a family, in eval mode; the same object for the same arguments."""
    about = FAMILIES[family]
    config = getattr(transformers, f"{about.config}Config")(**{**about.fields, **_TOKENS, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    with torch.inference_mode(False):  # whoever asks first
        model = getattr(transformers, about.model)(config).to(dtype).eval()
    model.generation_config.eos_token_id = None  # all texts are of one length, whatever the class's default
    return model


def prompts(lengths: Sequence[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(2, VOCABULARY, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(list(lengths)).view(-1, 1)
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


def lossless(block: int = 32, **fields: Any) -> MixKVQCache:
    """The lossless preset with short blocks, so that short prompts are packed."""
    return MixKVQCache("lossless", block_length=block, residual_length=block, **fields)


def generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, new_tokens: int, **options: Any) -> Any:
    """``model.generate`` with all logits, without sampling unless the options say otherwise."""
    return model.generate(
        **inputs,
        **cache_argument(cache),
        max_new_tokens=new_tokens,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **{"do_sample": False, **options},
    )


def assert_same_tokens(expected: Any, got: Any, tolerance: float = 1e-5) -> None:
    """The same tokens, or at a row's first difference a tie of logits (beams: scores): ``tolerance`` of their range."""
    if torch.equal(expected.sequences, got.sequences):
        return
    first_logit = expected.sequences.shape[1] - len(expected.logits)
    for row in range(len(expected.sequences)):
        wrong = (expected.sequences[row] != got.sequences[row]).nonzero()
        if not len(wrong):
            continue
        if getattr(expected, "sequences_scores", None) is not None:
            span = float(expected.logits[0].max() - expected.logits[0].min())
            gap = abs(float(expected.sequences_scores[row] - got.sequences_scores[row]))
        else:
            step = int(wrong[0])
            logits = expected.logits[step - first_logit][row]
            span = float(logits.max() - logits.min())
            gap = abs(float(logits[expected.sequences[row, step]] - logits[got.sequences[row, step]]))
        assert gap <= tolerance * span, f"row {row}: other tokens, and no tie: {gap} of {span}"


def forward(
    model: Any,
    cache: Any,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None = None,
    *,
    gradients: bool = False,
    **options: Any,
) -> torch.Tensor:
    """Logits of one forward pass; the cache grows."""
    inputs = {"input_ids": ids, "attention_mask": mask, **options}
    given = {name: value for name, value in inputs.items() if value is not None}
    with torch.set_grad_enabled(gradients):
        return model(**given, **cache_argument(cache), use_cache=True).logits


def dense_copy(cache: MixKVQCache, config: Any = None) -> DynamicCache:
    """A `DynamicCache` with the decoded keys and values of a cache of growing layers."""
    copied = DynamicCache(config=config) if config is not None else DynamicCache()
    for index, layer in enumerate(copy.deepcopy(cache).layers):
        copied.update(layer.keys, layer.values, index)
    return copied


def paths(cache: MixKVQCache) -> list[str]:
    """Path of every layer."""
    return [layer.path for layer in cache.report().layers]


def relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two sets of logits, in units of their range."""
    return float((a - b).abs().max() / (b.max() - b.min()))
