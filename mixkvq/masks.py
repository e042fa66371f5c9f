"""What attention masks say: which keys a query sees, and where a padded row begins."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .operators import waits

NO_TOKEN = 1 << 62
"""Start of a row that has no real token yet."""


HIDDEN = -5000.0
"""An additive mask hides what gets this or less: half of -10000, the mildest that models hide by (older BERT and T5);
others take -1e9, the dtype's lowest value or -inf. A key that scores thousands less than another has a weight of
exactly 0 in every dtype, be it for a mask or for a bias of distance (ALiBi)."""


def allowed(mask: torch.Tensor) -> torch.Tensor:
    """Where a mask lets a query attend: True, or more than `HIDDEN`."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def first_columns(mask: torch.Tensor | None, batch: int, columns: int) -> torch.Tensor:
    """First column of every row that any of its queries may attend to.

    Parameters
    ----------
    mask : tensor [B or 1, Q or 1, n, columns or more], optional
    batch : int
        B.
    columns : int

    Returns
    -------
    int64 tensor [B], on the CPU
        `NO_TOKEN` where there is none.
    """
    global _latest
    if mask is None:
        return torch.zeros(batch, dtype=torch.int64, device="cpu")
    kept = waits(mask) and not mask.is_inference()  # of which no changes are counted
    asked = batch, columns, mask._version if kept else None
    latest, was_asked, known = _latest  # at once: there may be other threads
    if kept and latest() is mask and was_asked == asked:
        return known.clone()
    first = []
    for row in mask.expand(batch, -1, -1, -1)[..., :columns]:
        seen = allowed(row[:, -1]).any(0)
        bound = int(seen.int().argmax()) if bool(seen.any()) else columns
        if bound:  # columns before those of the last query may still serve an earlier one
            earlier = allowed(row[:, :, :bound]).any(0).any(0)
            bound = int(earlier.int().argmax()) if bool(earlier.any()) else bound
        first.append(bound if bound < columns else NO_TOKEN)
    found = torch.tensor(first, dtype=torch.int64, device="cpu")
    if kept:
        _latest = weakref.ref(mask), asked, found
    return found


_latest: tuple[Any, Any, torch.Tensor] = (lambda: None, None, torch.empty(0, device="cpu"))
"""The mask on a device that was read last, and what was found: all layers of a step get the same."""


def reveals_padding(mask: torch.Tensor | None, starts: tuple[int, ...]) -> bool:
    """Whether a mask shows some row a column before its first real token, which a packed layer does not store.

    Parameters
    ----------
    mask : tensor [B or 1, Q or 1, n, columns], optional
    starts : tuple of int
        Each row's column of its first real token.
    """
    padding = max(starts, default=0)
    if padding == 0 or mask is None:
        return padding > 0
    seen = allowed(mask[..., :padding]).flatten(1, 2).any(1)
    column = torch.arange(padding, device=mask.device)
    return bool((seen & (column < torch.tensor(starts, device=mask.device).view(-1, 1))).any())


def rows_that_see(mask: torch.Tensor | None, batch: int, keys: int, device: torch.device) -> torch.Tensor:
    """Rows (bool [B]) whose last query may attend to at least this many keys, in every head."""
    if mask is None:
        return torch.ones(batch, dtype=torch.bool, device=device)
    return (allowed(mask[:, :, -1]).sum(-1).amin(1) >= keys).expand(batch)
