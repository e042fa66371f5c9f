"""A random Llama of realistic shape, made on the device, and caches filled without running it over a prompt."""

from __future__ import annotations

import gc
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mixkvq.eval.memory import cache_nbytes
from mixkvq.hook import wrap

from . import data
from .timing import Deadline


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: by default those of an 8B model with 8 KV heads of 4 query heads each."""

    num_hidden_layers: int = 32
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 128256
    max_position_embeddings: int = 1 << 20


FULL = Shape()
TINY = Shape(2, 256, 512, 8, 2, 64, 512)


def make(shape: Shape, device: str) -> Any:
    """A `LlamaForCausalLM` in bfloat16 with random weights; nothing passes through the host's memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**asdict(shape))
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval()


def device_bytes(device: str) -> int:
    """Bytes that tensors hold on the device; 0 on the CPU, where nobody counts."""
    if device == "cpu":
        return 0
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


class Late(RuntimeError):
    """No time is left."""


def fill(cache: Any, model: Any, batch: int, tokens: int, device: str, deadline: Deadline, chunk: int = 0) -> int:
    """Hand random keys and values to every layer by ``cache.update``, and attend to them with one query per head.

    That is what a prompt leaves behind, but its hidden states are never computed. All layers get the same numbers, in
    memory of their own.

    Parameters
    ----------
    chunk : int
        Tokens per update; 0: all at once, as one forward pass would.

    Returns
    -------
    int
        Bytes that the cache holds now: by the allocator, or, on the CPU, by its tensors.

    Raises
    ------
    Late
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention, config = wrap(sdpa_attention_forward), model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    q = data.queries(batch, config.num_attention_heads // heads, dim, device, heads)
    before = device_bytes(device)
    step = chunk or tokens
    k, v = data.states(batch, min(step, tokens), dim, device, heads)
    with torch.no_grad():
        for index in range(config.num_hidden_layers):
            module = model.model.layers[index].self_attn
            for begin in range(0, tokens, step):
                if deadline.passed():
                    raise Late
                n = min(step, tokens - begin)
                keys, values = cache.update(k[:, :, :n], v[:, :, :n], index)
                attention(module, q, keys, values, None, scaling=module.scaling)
                del keys, values
    del k, v
    held = device_bytes(device) - before
    return held if device != "cpu" else cache_nbytes(cache)


def token(batch: int, device: str) -> Tensor:
    """Ids of one token per row, [B, 1]."""
    return torch.full((batch, 1), 7, dtype=torch.int64, device=device)
