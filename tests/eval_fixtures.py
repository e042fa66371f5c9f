"""A tiny language model that reads and writes bytes, for measurements that need real text."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = 0
"""Id of the end token, which also pads."""


@lru_cache(maxsize=1)
def byte_model() -> tuple[Any, Any]:
    """Random Llama: 2 layers, 4 query and 2 KV heads, head_dim 16, one token per byte. Returns (model, tokenizer)."""
    torch.set_num_threads(1)
    vocabulary = {"<end>": END, **{c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,  # logits that differ by more than rounding
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def save_byte_model(folder: Path) -> Path:
    """The same as a folder that `--model` accepts."""
    model, tokenizer = byte_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ignore(event: str, value: Any) -> None:
    """An `emit` that is not told anything."""


class Deaf:
    """Stands for a model that must not be run any more."""

    def __init__(self, model: Any) -> None:
        self.config, self.dtype, self.device = model.config, model.dtype, model.device
        self.named_parameters = model.named_parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was run")
