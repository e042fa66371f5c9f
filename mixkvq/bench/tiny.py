"""A small random Llama whose steps are nearly all attention, and caches filled without running it over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compat import attention_function
from ..hook import wrap
from .samples import Sampler, repeated

_SAMPLE, _HIDDEN = 2048, 128


def tiny_llama(head_dim: int, group: int, heads: int, layers: int, attention: str) -> Any:
    """A `LlamaForCausalLM` in float32, the same for the same shape.

    Parameters
    ----------
    head_dim, group, heads, layers : int
        ``heads`` KV heads of ``group`` query heads each.
    attention : {"sdpa", "eager"}
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=-(-_HIDDEN // (heads * group)) * heads * group,  # transformers wants a multiple of the heads
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=heads * group,
        num_key_value_heads=heads,
        head_dim=head_dim,
        max_position_embeddings=1 << 20,
    )
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
    return model.eval()


def states_of(head_dim: int, heads: int, layers: int, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, float32 [1, H, N, D]; what repeats after some thousand tokens is memory's own."""
    samples = (Sampler(head_dim, heads, seed).states(min(tokens, _SAMPLE)) for seed in range(1, layers + 1))
    return [(repeated(k, tokens), repeated(v, tokens)) for k, v in samples]


class Replay:
    """The lines of a model's attention layers that touch the cache, on queries, keys and values that stay the same.

    Parameters
    ----------
    model
        From `tiny_llama`.
    states : list of pairs of tensors [1, H, N, D]
        One per layer; the new token is the last of them.
    """

    def __init__(self, model: Any, states: list[tuple[Tensor, Tensor]]) -> None:
        self._name = model.config._attn_implementation
        self._layers = []
        for index, (k, v) in enumerate(states):
            module = model.model.layers[index].self_attn
            q = Sampler(k.shape[3], k.shape[1], index + 1).queries(module.num_key_value_groups)
            self._layers.append((module, q, k[:, :, -1:].clone(), v[:, :, -1:].clone()))

    def __call__(self, cache: Any) -> Tensor:
        """One step; the output of the last layer, [1, 1, Q, D]."""
        from transformers.models.llama.modeling_llama import eager_attention_forward

        with torch.no_grad():
            for index, (module, q, k, v) in enumerate(self._layers):
                keys, values = cache.update(k, v, index)
                attention = attention_function(self._name, eager_attention_forward)
                output: Tensor = attention(module, q, keys, values, None, dropout=0.0, scaling=module.scaling)[0]
        return output


def fill(cache: Any, model: Any, states: list[tuple[Tensor, Tensor]]) -> None:
    """Let a cache take over the keys and values of a prompt, layer by layer, as attention would hand them over.

    Attention is run for the last query only: that is what a `MixKVQCache` proves itself by before it packs.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    attention = wrap(sdpa_attention_forward)
    with torch.no_grad():
        for index, (k, v) in enumerate(states):
            module = model.model.layers[index].self_attn
            q = Sampler(k.shape[3], k.shape[1], index + 1).queries(module.num_key_value_groups)
            keys, values = cache.update(k, v, index)
            attention(module, q, keys, values, None, scaling=module.scaling)
