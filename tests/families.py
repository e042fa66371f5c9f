"""Every model family that the cache is tried on: a tiny random configuration and the path its layers must take."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mixkvq import compat

PACKED, NATIVE, DECODED = "packed", "native", "dequantized"
VOCABULARY = 97


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes
    ----------
    name : str
        As in `FAMILIES`.
    config : str
        Name of the configuration's class without "Config"; the model is ``<config>ForCausalLM`` unless ``model`` says.
    fields : dict
        Of the configuration.
    paths : tuple of str
        Path of every layer of the cache once a prompt beyond the window was read.
    attention : tuple of str
        Attention implementations that the family has.
    model : str
        Class of the model, where it is another.
    encoder : bool
        Whether an encoder reads the prompt first (the cache is the decoder's half of an `EncoderDecoderCache`).
    since : pair of int
        First version of transformers that has it and works with `DynamicCache`.
    """

    name: str
    config: str
    fields: dict[str, Any] = field(repr=False)
    paths: tuple[str, ...]
    attention: tuple[str, ...] = ("sdpa", "eager")
    model: str = ""
    encoder: bool = False
    since: tuple[int, int] = (4, 57)

    @property
    def present(self) -> bool:
        """Whether the installed transformers has it."""
        return self.since <= compat.VERSION


_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # logits that differ by far more than rounding
}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
_MLA = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
_MOE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_DEEPSEEK = {**_SHAPE, **_MLA, **_MOE, "num_key_value_heads": 4, "head_dim": 8, "first_k_dense_replace": 1}
_WINDOW = {**_SHAPE, "sliding_window": 48}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llama", "Llama", _SHAPE, (PACKED, PACKED)),
        Family("qwen2", "Qwen2", _SHAPE, (PACKED, PACKED)),
        Family("qwen3", "Qwen3", _SHAPE, (PACKED, PACKED)),
        Family("phi3", "Phi3", _SHAPE, (PACKED, PACKED)),
        Family("mistral", "Mistral", _WINDOW, (NATIVE, NATIVE)),
        Family("gemma2", "Gemma2", {**_WINDOW, "query_pre_attn_scalar": 16}, (NATIVE, PACKED), ("eager",)),
        Family(
            "gpt_oss",
            "GptOss",
            {**_WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
            (NATIVE, PACKED),
            ("eager",),
        ),
        Family("bloom", "Bloom", _BLOOM, (DECODED, DECODED), ("eager",)),
        Family("deepseek_v3", "DeepseekV3", _DEEPSEEK, (NATIVE, NATIVE)),
        Family(
            "qwen3_next",
            "Qwen3Next",
            {**_SHAPE, **_EXPERTS, **_LINEAR, "layer_types": ["linear_attention", "full_attention"]},
            (NATIVE, PACKED),
            since=(5, 8),
        ),
    )
}
"""All families by name."""
