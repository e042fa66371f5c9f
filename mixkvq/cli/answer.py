"""One ``generate`` call, watched and measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..compat import cache_argument
from ..eval.memory import PeakMemory, cache_nbytes
from ..eval.stream import Emit, TokenStream, layer_progress


@dataclass(frozen=True)
class Answer:
    """What one run of ``generate`` gave."""

    text: str
    ids: list[int]
    """New tokens, the end token included."""
    prompt_tokens: int
    prompt_seconds: float
    """Until the first new token was known."""
    decode_seconds: float
    """From the first new token to the last."""
    cache_tokens: int
    """Tokens in the cache at the end: all but the last new one."""
    cache_bytes: int
    peak_extra_bytes: int | None
    """Resident memory of the process above what it was with the model loaded; None where the system does not tell."""
    trace: list[tuple[int, int]]
    """(tokens in the cache, bytes of the cache) at every new token."""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def decode_rate(self) -> float:
        """New tokens per second after the first; 0 if there is only one."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else 0.0


def answer(model: Any, tokenizer: Any, ids: torch.Tensor, cache: Any, emit: Emit, **options: Any) -> Answer:
    """Continue `ids` with ``model.generate`` and the given cache.

    Parameters
    ----------
    model, tokenizer : a causal language model of transformers and its tokenizer
    ids : int64 tensor [1, n]
    cache : transformers Cache, empty
    emit : callable
        Told of layers passed while the prompt is read, then of the text.
    options
        For ``generate``: ``max_new_tokens``, ``do_sample``, ...
    """
    peak = PeakMemory()
    peak.start()
    stream = TokenStream(tokenizer, emit, lambda: cache_nbytes(cache))
    with torch.inference_mode(), layer_progress(model, emit):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), streamer=stream, **options
        )
    new = out[0, ids.shape[1] :].tolist()
    return Answer(
        text=tokenizer.decode(new, skip_special_tokens=True),
        ids=new,
        prompt_tokens=ids.shape[1],
        prompt_seconds=stream.times[0],
        decode_seconds=stream.times[-1] - stream.times[0],
        cache_tokens=int(cache.get_seq_length()),
        cache_bytes=cache_nbytes(cache),
        peak_extra_bytes=peak.extra,
        trace=[(ids.shape[1] + i, size) for i, size in enumerate(stream.sizes)],
    )
