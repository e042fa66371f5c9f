"""A process of its own that answers with saved caches: python answer.py FILE...

Each FILE is called FAMILY.ATTENTION.safetensors and holds the cache of such a tiny model after a prompt. Beside it,
FILE.pt gets the tokens and logits of what follows.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from families import FAMILIES
from models import generate, prompts, tiny

from mixkvq import MixKVQCache

PROMPT, QUESTION, NEW_TOKENS = [90, 77], 12, 40


def answer(model, cache):
    """Go on with the prompt's cache: a question, then enough tokens for a block to be packed."""
    inputs, question = prompts(PROMPT), prompts([QUESTION] * 2, seed=7)
    inputs = {name: torch.cat([inputs[name], question[name]], 1) for name in inputs}
    return generate(model, inputs, cache, NEW_TOKENS)


def main() -> None:
    torch.set_num_threads(1)
    for file in map(Path, sys.argv[1:]):
        family, attention, _ = file.name.split(".")
        model = tiny(family, attention)
        seen = "dequantized" not in FAMILIES[family].paths(attention)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if seen else "ignore")  # decoding in every step is warned of
            result = answer(model, MixKVQCache.load(file, None if seen else model.config))
        torch.save({"tokens": result.sequences, "logits": torch.stack(result.logits)}, f"{file}.pt")


if __name__ == "__main__":
    main()
