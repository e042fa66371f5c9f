"""`Decoder`: one cache on its way through a text, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..compat import cache_argument
from ..eval.replay import read


@dataclass
class Decoder:
    """A cache behind a prompt, and the text that follows.

    Attributes
    ----------
    model, cache
    ids : int64 tensor [1, n]
        Of the whole text.
    position : int
        Of the next token to feed.
    blocks : list of int
        Packed blocks before every timed step.
    """

    model: Any
    cache: Any
    ids: torch.Tensor
    position: int = 0
    blocks: list[int] = field(default_factory=list)

    def read(self, tokens: int) -> None:
        """The first tokens, at once."""
        with torch.no_grad():
            read(self.model, self.ids[:, :tokens], None, self.cache)
        self.position = tokens

    def step(self) -> None:
        """Feed the next token."""
        with torch.no_grad():
            self.model(self.ids[:, self.position : self.position + 1], **cache_argument(self.cache), use_cache=True)
        self.position += 1

    def count(self) -> None:
        """Note how many blocks are packed."""
        self.blocks.append(packed_blocks(self.cache))

    def flushed(self) -> list[int]:
        """Timed steps in which blocks were packed; `count` must have been called after the last, too."""
        return [i for i, (a, b) in enumerate(zip(self.blocks, self.blocks[1:], strict=False)) if b > a]


def packed_blocks(cache: Any) -> int:
    """Blocks that all layers of a cache have packed; 0 for caches that do not pack."""
    stores = (getattr(layer, "store", None) for layer in cache.layers)
    return sum(int(store.blocks.sum()) for store in stores if store is not None)
