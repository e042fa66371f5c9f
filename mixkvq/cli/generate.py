"""``mixkvq generate``: any model, any preset, the text streamed to standard output."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from rich.console import Console

from ..config import MixKVQConfig
from ..errors import UserError
from ..eval.models import load
from .display import Display
from .text import chat_ids


@dataclass(frozen=True)
class GenerateOptions:
    """Options of the command; the fields are explained in `mixkvq.cli.app`."""

    model: str
    preset: str = "default"
    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "auto"
    threads: int | None = None
    report: bool = False

    def __post_init__(self) -> None:
        try:
            MixKVQConfig.preset(self.preset)
        except ValueError as error:
            raise UserError(f"--preset: {error}") from error
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens is {self.max_new_tokens}, must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}, must be 0 (greedy) or more")
        if self.threads is not None and self.threads < 1:
            raise UserError(f"--threads is {self.threads}, must be at least 1")


def generate(prompt: str, options: GenerateOptions) -> str:
    """Stream the continuation of `prompt` to standard output, everything else to standard error; returns the text.

    Raises
    ------
    UserError
        When the prompt is empty or the model cannot be loaded.
    """
    import torch

    from .. import MixKVQCache
    from .answer import answer

    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise UserError("the prompt is empty")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    aside = Display(Console(stderr=True), {"layer": "reading the prompt, layer by layer"})
    model, tokenizer = load(options.model, options.dtype, lambda text: aside.show("say", text))
    ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    cache = MixKVQCache(options.preset, config=model.config)

    def show(event: str, value: object) -> None:
        if event == "text":
            aside.close()
            print(value, end="", flush=True)
        else:
            aside.show(event, value)

    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    torch.manual_seed(options.seed)
    result = answer(model, tokenizer, ids, cache, show, max_new_tokens=options.max_new_tokens, **sampling)
    print(flush=True)
    if options.report:
        Console(stderr=True).print(str(cache.report()), markup=False, highlight=False, soft_wrap=True)
        rates = f"prompt {result.prompt_rate:.0f} tokens/s, decoding {result.decode_rate:.1f} tokens/s"
        Console(stderr=True).print(rates, highlight=False)
    return result.text
