"""Teacher-forced reading: a model is fed a text through a cache, and its logits are compared with the exact ones.

The protocol of every KL number in this package: the first tokens in one exact forward pass (what a cache packs, it
packs after the attention of a layer), the others in chunks that end on the cache's block borders.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..compat import cache_argument
from ..config import MixKVQConfig
from .replay import Prefill
from .schemes import Scheme

Doubles = NDArray[np.float64]


def chunk_ends(first: int, last: int, sink_length: int, block_length: int) -> Iterator[int]:
    """Ends of chunks that cover the tokens from `first` to `last` and stop at every block border.

    A chunk sees its own tokens exactly and a cache packs a block when it is full, so such chunks give the logits of
    token-by-token decoding.
    """
    end = first
    while end < last:
        blocks = max(0, end - sink_length) // block_length + 1
        end = min(last, sink_length + blocks * block_length)
        yield end


def scheme_ends(scheme: Scheme, first: int, last: int) -> list[int]:
    """Ends of chunks on the block borders of a scheme; of `default` for a scheme that has none of its own."""
    config = scheme.config or MixKVQConfig.preset("default")
    return list(chunk_ends(first, last, config.sink_length, config.block_length))


def kl_divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> torch.Tensor:
    """KL(p || q), the sum of p (ln p - ln q), in nats, of two logit tensors [n, vocabulary]: float64 [n]."""
    return kl_of_logs(torch.log_softmax(p_logits.float(), dim=-1), torch.log_softmax(q_logits.float(), dim=-1))


def kl_of_logs(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the last axis of two float32 tensors of log probabilities, -inf where neither has any: float64.

    As sum of p (d + e^-d - 1) with d = ln p - ln q, which is the same since p and q sum to 1: no term is negative, and
    rounding in d counts by its square, so that nearly equal logits give nearly 0 instead of the noise of float32.
    """
    p, d = log_p.exp(), (log_p - log_q).masked_fill(log_p == -torch.inf, 0.0)
    far = d < -1  # there p e^-d = q is safe from overflow, and nothing cancels
    terms = torch.where(far, log_q.exp() - p + p * d, p * (d + torch.expm1(-d.clamp(min=-1))))
    return terms.sum(dim=-1, dtype=torch.float64)


def forced_logits(
    model: Any, ids: torch.Tensor, prefill: Prefill, cache: Any, ends: list[int]
) -> Iterator[torch.Tensor]:
    """Logits at the positions behind a prefill, chunk by chunk.

    Parameters
    ----------
    model : causal language model
    ids : int64 tensor [1, n]
    prefill : Prefill
        The first tokens of ``ids``, read before.
    cache : transformers Cache, empty
    ends : list of int
        Ends of the chunks, see `chunk_ends`.

    Yields
    ------
    tensor [tokens of the chunk, vocabulary]
    """
    with torch.inference_mode():
        prefill.replay(cache)
        for begin, end in zip([prefill.tokens, *ends], ends, strict=False):
            yield model(ids[:, begin:end], **cache_argument(cache)).logits[0]


@dataclass(frozen=True)
class Comparison:
    """One cache against the exact one, position by position; arrays of the same length."""

    kl: Doubles
    """KL(exact || other) in nats."""
    nll_exact: Doubles
    """Negative log-likelihood of the token that really follows, in nats, with the exact cache; NaN at the last."""
    nll: Doubles
    """The same with the other cache."""
    agree: NDArray[np.bool_]
    """Whether both put the same token first."""


def compare(exact: list[torch.Tensor], other: Iterator[torch.Tensor], targets: torch.Tensor) -> Comparison:
    """Compare logits chunk by chunk.

    Parameters
    ----------
    exact : list of tensors [n, vocabulary]
        Chunks of the exact cache.
    other : iterator over tensors [n, vocabulary]
        The same chunks of another.
    targets : int64 tensor [positions]
        The token that follows each position; -1: unknown.
    """
    kl, agree = list[torch.Tensor](), list[torch.Tensor]()
    nll_exact, nll = list[torch.Tensor](), list[torch.Tensor]()
    begin = 0
    for p, q in zip(exact, other, strict=True):
        want = targets[begin : begin + len(p)]
        begin += len(p)
        kl.append(kl_divergence(p, q))
        agree.append(p.argmax(-1) == q.argmax(-1))
        for logits, values in ((p, nll_exact), (q, nll)):
            picked = torch.log_softmax(logits.float(), -1).gather(1, want.clamp(min=0)[:, None])[:, 0].double()
            values.append(torch.where(want >= 0, -picked, torch.nan))
    return Comparison(*(torch.cat(parts).numpy() for parts in (kl, nll_exact, nll, agree)))
