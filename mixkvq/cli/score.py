"""Teacher-forced comparison of two caches: KL divergence and top-1 agreement at every position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..compat import cache_argument
from ..eval.forced import chunk_ends, kl_divergence
from ..eval.memory import cache_nbytes
from ..eval.stream import Emit, layer_progress


@dataclass(frozen=True)
class Score:
    """What `teacher_forced` measured, position by position."""

    prefill: int
    """Tokens read exactly before the first scored position."""
    chunks: int
    kl: list[float]
    """KL(exact || other) in nats at every scored position."""
    agree: list[bool]
    """Whether both put the same token first."""
    trace: list[tuple[int, int, int]]
    """(tokens, bytes of the exact cache, bytes of the other), after the prefill and after every chunk."""

    def mean_kl(self, positions: int | None = None) -> float:
        """Mean KL divergence in nats over all positions, or over the first `positions`."""
        part = self.kl[:positions]
        return sum(part) / len(part)

    def agreement(self, positions: int | None = None) -> float:
        """Share of all positions, or of the first `positions`, with the same most likely token."""
        part = self.agree[:positions]
        return sum(part) / len(part)


def teacher_forced(
    model: Any, ids: torch.Tensor, prefill: int, exact: Any, other: Any, sink_length: int, block_length: int, emit: Emit
) -> Score:
    """Feed the same text to the model with two caches and compare the logits.

    Both caches read ``ids[:, :prefill]`` in one exact forward pass (what a cache packs, it packs after the attention of
    a layer); the other tokens follow in chunks that end on block borders, see `mixkvq.eval.forced.chunk_ends`.

    Parameters
    ----------
    model : causal language model
    ids : int64 tensor [1, n]
    prefill : int
        1 ... n - 1; n - prefill positions are scored.
    exact, other : transformers Cache, both empty
    sink_length, block_length : int
        Where block borders are in `other`.
    emit : callable
        Told of ("layer", ...) during the first prefill and of ("chunk", (scored, to score)) after every chunk.
    """
    kl, agree = list[float](), list[bool]()
    trace = list[tuple[int, int, int]]()
    ends = list(chunk_ends(prefill, ids.shape[1], sink_length, block_length))
    with torch.inference_mode():
        with layer_progress(model, emit):
            model(ids[:, :prefill], **cache_argument(exact), logits_to_keep=1)
        model(ids[:, :prefill], **cache_argument(other), logits_to_keep=1)
        trace.append((prefill, cache_nbytes(exact), cache_nbytes(other)))
        for begin, end in zip([prefill, *ends], ends, strict=False):
            p, q = (model(ids[:, begin:end], **cache_argument(cache)).logits[0] for cache in (exact, other))
            kl += kl_divergence(p, q).tolist()
            agree += (p.argmax(-1) == q.argmax(-1)).tolist()
            trace.append((end, cache_nbytes(exact), cache_nbytes(other)))
            emit("chunk", (end - prefill, ids.shape[1] - prefill))
    return Score(prefill=prefill, chunks=len(ends), kl=kl, agree=agree, trace=trace)
