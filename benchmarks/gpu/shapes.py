"""The shapes at which attention is compared."""

from __future__ import annotations

from dataclasses import dataclass

PRESETS = ("default", "compact", "near-lossless", "kivi-2", "paper")
OURS = ("default", "compact")


@dataclass(frozen=True)
class Shape:
    """What is compared at one length.

    Attributes
    ----------
    head_dim, tokens : int
    groups : tuple of int
        Query heads per KV head.
    presets : tuple of str
    rows : int
        Of the batch; 0: as many as make enough bytes.
    """

    head_dim: int
    tokens: int
    groups: tuple[int, ...]
    presets: tuple[str, ...] = OURS
    rows: int = 0

    def __str__(self) -> str:
        return f"head_dim {self.head_dim}, {self.tokens} tokens, {self.rows or 'many'} rows"


GRID = (  # the most telling first: a run may be cut short
    Shape(128, 32768, (4, 8, 1), PRESETS),
    Shape(128, 131072, (4, 1, 8)),
    Shape(64, 32768, (4, 1, 8)),
    Shape(128, 4096, (4, 1, 8)),
    Shape(128, 32768, (4,), OURS, 1),
    Shape(64, 131072, (4,)),
    Shape(64, 4096, (4,)),
)
TINY = (Shape(64, 300, (1, 4), ("default", "kivi-2")),)
