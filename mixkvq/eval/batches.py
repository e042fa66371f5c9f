"""Continuing a padded batch of prompts until every row has met its end, with rows dropped as they finish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import QuantizedCache, StoppingCriteria, StoppingCriteriaList

from ..compat import cache_argument
from .replay import Prefill, read

STAGE = 32
"""Tokens after which finished rows leave the batch."""


class _Finished(StoppingCriteria):
    """Which rows have written a stop string; kept from stage to stage by the caller."""

    def __init__(self, tokenizer: Any, begin: int, stops: Sequence[str]) -> None:
        self._tokenizer, self._begin, self._stops = tokenizer, begin, stops
        # a string may be written in other tokens than the tokenizer would choose, so a few more are read again
        self._back = 2 + max((len(tokenizer.encode(s, add_special_tokens=False)) for s in stops), default=0)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        tails = self._tokenizer.batch_decode(input_ids[:, self._begin :][:, -self._back :])
        return torch.tensor([any(s in tail for s in self._stops) for tail in tails], device=input_ids.device)


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as one tensor [B, longest], padded on the left, and the mask of their tokens."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def read_batch(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> Prefill | None:
    """The first pass over prompts but their last tokens, for any `continue_batch`; None if a prompt has no other."""
    if min(map(len, prompts)) < 2:
        return None
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    return Prefill.record(model, ids[:, :-1].to(model.device), mask[:, :-1].to(model.device))


def continue_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    cache: Any,
    new_tokens: int,
    stops: Sequence[str] = (),
    prefill: Prefill | None = None,
    **options: Any,
) -> list[list[int]]:
    """Continue prompts with ``model.generate``, one cache for all of them.

    The prompts but their last tokens are read at once; those, like all new tokens, are read through the filled cache.

    Parameters
    ----------
    model, tokenizer : a causal language model of transformers and its tokenizer, which has a padding token
    prompts : sequence of token ids
    cache : transformers Cache, empty
    new_tokens : int
        At most, for each row.
    stops : sequence of str
        A row ends with the token that completes one of them, or with an end token of the model.
    prefill : Prefill, optional
        Of these prompts, padded, without their last token (see `read_batch`): they are not read again.
    **options
        For ``generate``, such as ``do_sample=False``.

    Returns
    -------
    list
        New tokens of each row, the last of which may complete a stop string or be an end token.
    """
    ids, mask = pad_left(prompts, tokenizer.pad_token_id)
    ids, mask, begin = ids.to(model.device), mask.to(model.device), ids.shape[1]
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    finished = _Finished(tokenizer, begin, stops)
    found: list[list[int]] = [[] for _ in prompts]
    rows, going = list(range(len(prompts))), set(range(len(prompts)))
    with torch.inference_mode():
        if prefill is not None:
            prefill.replay(cache)
        elif min(map(len, prompts)) > 1:
            read(model, ids[:, :-1], mask[:, :-1], cache)
        while going and ids.shape[1] < begin + new_tokens:
            before = ids.shape[1]
            ids = model.generate(
                ids,
                attention_mask=mask,
                **cache_argument(cache),
                max_new_tokens=min(STAGE, begin + new_tokens - before),
                stopping_criteria=StoppingCriteriaList([finished]),
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
            mask = torch.cat([mask, mask.new_ones(len(rows), ids.shape[1] - before)], 1)
            for row, new in zip(rows, ids[:, before:].tolist(), strict=True):
                if row in going and not _take(found[row], new, tokenizer, ends, stops):
                    going.remove(row)
            if 0 < len(going) < len(rows) and not isinstance(cache, QuantizedCache):  # which cannot drop rows
                kept = torch.tensor([at for at, row in enumerate(rows) if row in going], device=ids.device)
                cache.batch_select_indices(kept)
                ids, mask, rows = ids[kept], mask[kept], [rows[at] for at in kept.tolist()]
    return found


def _take(into: list[int], new: Sequence[int], tokenizer: Any, ends: list[int], stops: Sequence[str]) -> bool:
    """Append tokens up to the row's end; returns whether it goes on."""
    for token in new:
        into.append(token)
        if token in ends or (stops and any(s in tokenizer.decode(into) for s in stops)):
            return False
    return True
