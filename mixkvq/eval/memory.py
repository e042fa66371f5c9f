"""Bytes: of a cache, of the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def cache_nbytes(cache: Any) -> int:
    """Bytes that a cache holds: ``report().nbytes`` of a `MixKVQCache`, else the sum over its keys and values."""
    if hasattr(cache, "report"):
        return int(cache.report().nbytes)
    tensors = [t for layer in cache.layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def bf16_nbytes(config: Any, tokens: int) -> int:
    """Bytes of a bf16 `DynamicCache` of full-attention layers that holds `tokens` tokens of one sequence."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * 2 * int(text.num_hidden_layers) * int(heads) * int(head_dim) * tokens


def _status(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


class PeakMemory:
    """Highest resident memory of this process since `start`, less what was resident then.

    The kernel keeps the mark (``VmHWM``), so nothing is missed between samples. Where it cannot be reset (not Linux, or
    a sandbox without ``/proc/self/clear_refs``) `extra` is None: better no number than one that includes loading.
    """

    def __init__(self) -> None:
        self._before: int | None = None

    def start(self) -> None:
        """Reset the mark to what is resident now."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return
        self._before = _status("VmRSS")

    @property
    def extra(self) -> int | None:
        """Bytes above the start, or None where the system does not tell."""
        peak = _status("VmHWM")
        return None if self._before is None or peak is None else max(0, peak - self._before)
