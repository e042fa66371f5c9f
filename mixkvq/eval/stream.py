"""Watching ``model.generate`` from outside: tokens as they come, layers as the prompt passes through them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.generation.streamers import BaseStreamer

Emit = Callable[[str, Any], None]
"""Told of ("layer", (done, total)), ("text", str), ("chunk", (tokens, total)) and ("say", str)."""


class TokenStream(BaseStreamer):
    """Emits the text of the answer, keeps the time of every token and the cache's size at that time.

    Parameters
    ----------
    tokenizer : tokenizer of the model
    emit : callable
    nbytes : callable, optional
        Called at every token; the time it takes is not counted.

    Attributes
    ----------
    times : list of float
        Seconds after construction at which each new token was known, less the time spent here.
    sizes : list of int
        What `nbytes` returned: before the forward pass that reads this token.
    """

    def __init__(self, tokenizer: Any, emit: Emit, nbytes: Callable[[], int] | None = None) -> None:
        self._tokenizer, self._emit, self._nbytes = tokenizer, emit, nbytes
        self._start, self._own = time.perf_counter(), 0.0
        self._prompt_seen, self._ids, self._shown = False, list[int](), 0
        self.times, self.sizes = list[float](), list[int]()

    def put(self, value: Any) -> None:
        """Take the prompt (first call) or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        entered = time.perf_counter()
        self.times.append(entered - self._start - self._own)
        self._ids += value.flatten().tolist()
        if self._nbytes is not None:
            self.sizes.append(self._nbytes())
        self._show(final=False)
        self._own += time.perf_counter() - entered

    def end(self) -> None:
        """The answer is complete."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if final or not text.endswith("\ufffd"):  # a character cut in the middle waits for its other half
            if len(text) > self._shown:
                self._emit("text", text[self._shown :])
            self._shown = len(text)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a transformers model: its module list of ``num_hidden_layers`` entries, or []."""
    config: Any = model.config
    wanted = config.get_text_config(decoder=True).num_hidden_layers
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == wanted)
    return list(next(lists, []))


@contextmanager
def layer_progress(model: nn.Module, emit: Emit) -> Iterator[None]:
    """Emit ("layer", (done, total)) during the first forward pass, the one that reads the prompt."""
    layers = decoder_layers(model)
    handles: list[Any] = []

    def watch(index: int) -> Callable[..., None]:
        def passed(*_: Any) -> None:
            emit("layer", (index + 1, len(layers)))
            if index + 1 == len(layers):
                for handle in handles:
                    handle.remove()

        return passed

    handles += [layer.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
