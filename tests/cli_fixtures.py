"""A language model and a tokenizer made on the spot, saved as a folder that `--model` accepts."""

from __future__ import annotations

from pathlib import Path

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "and", "then", "it", "was", "big", "red", "blue"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def save_tiny_model(folder: Path, *, chat: bool = True, unused_tokens: int = 0) -> Path:
    """Random Llama: 2 layers, 4 query and 2 KV heads, head_dim 16, a vocabulary of words. Returns `folder`.

    The model never says one of the `unused_tokens`; they make its weights 512 bytes larger each.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", "user", "assistant", *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    if chat:
        tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary) + unused_tokens,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.4,  # logits that differ by more than rounding
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data[len(vocabulary) :] = 0  # some word always has a larger logit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
