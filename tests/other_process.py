"""What `test_sending` has another process do, which imports this file and not the test's."""

from __future__ import annotations

import torch
from models import forward, paths, tiny

MODEL = tiny()
TOKEN = torch.tensor([[5]])


def steps(cache, count=4):
    """Logits of so many tokens, one by one."""
    return torch.cat([forward(MODEL, cache, TOKEN + step) for step in range(count)], 1)


def worked(cache, count):
    """Length, logits of more tokens, paths, number of decodings, and the cache itself."""
    length = cache.get_seq_length()
    logits = steps(cache, count) if count else None
    return length, logits, paths(cache), sum(layer.dequantizations for layer in cache.layers), cache
