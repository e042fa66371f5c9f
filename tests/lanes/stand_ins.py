"""Write random models, in the layout of the hub's cache, under the names of those that transformers' tests download.

    python tests/lanes/stand_ins.py FOLDER

With ``HF_HUB_CACHE=FOLDER`` and without a network these tests then run; where they expect what the real models say,
they fail with every cache. What the hub's cache already holds is linked into the folder instead.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

REVISION = "0" * 40
VOCABULARY = 320
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NEOX = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    "d_model": 32,
    "max_position_embeddings": 512,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "hf-internal-testing/tiny-random-gpt2": ("gpt2", GPT2),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("llama", LLAMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("mistral", {**LLAMA, "sliding_window": None}),
    "hf-internal-testing/tiny-random-bart": ("bart", BART),
    "sshleifer/bart-tiny-random": ("bart", BART),
    "hf-internal-testing/tiny-random-t5": ("t5", T5),
    "EleutherAI/pythia-160m-deduped": ("gpt_neox", NEOX),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with few merges."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([__doc__ or ""], VOCABULARY, special_tokens=["<pad>", "<s>", "</s>", "<unk>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def write(folder: Path, name: str) -> None:
    """One random model and its tokenizer."""
    kind, shape = MODELS[name]
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=2, **shape)
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    home = folder / f"models--{name.replace('/', '--')}"
    for part in (auto.from_config(config), tokenizer()):
        part.save_pretrained(home / "snapshots" / REVISION)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text(REVISION)


def main(folder: Path) -> None:
    """Link what the hub's cache holds and write the rest."""
    folder.mkdir(parents=True, exist_ok=True)
    for held in Path(HF_HUB_CACHE).glob("models--*"):
        (folder / held.name).symlink_to(held.resolve())
    for name in MODELS:
        if not (folder / f"models--{name.replace('/', '--')}").exists():
            write(folder, name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
