"""What tests may ask of a transformers older than the newest; docs/versions.md has the limits.

Each limit is transformers' own: where its own cache works, ours is asked for the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import DynamicCache

from mixkvq import compat

needs_eager = pytest.mark.skipif(
    not compat.SEES_EAGER, reason="before transformers 5.1 eager attention is not looked up: no kernel can stand in"
)
needs_linear = pytest.mark.skipif(
    compat.LinearLayer is None, reason="before transformers 5.5 caches have no linear layers"
)

needs_new_quantized_cache = pytest.mark.skipif(
    compat.VERSION < (5, 20),
    reason="before, transformers' QuantizedCache coded at other times and took windowed models",
)


def kernel_path(attention: str) -> str:
    """Path of a layer whose attention the kernel can compute, by the name of its implementation."""
    return "packed" if attention != "eager" or compat.SEES_EAGER else "dequantized"


def with_stock_cache(run: Callable[[], Any]) -> Any:
    """What ``run`` gives, which uses transformers' own cache. A test of what fails with that one is left out.

    Only before the newest version: there, all that is tried works with transformers' own cache.
    """
    try:
        return run()
    except Exception as error:
        if compat.VERSION >= compat.NEWEST:
            raise
        why = str(error).strip().partition("\n")[0]
        pytest.skip(f"fails with transformers' own cache too: {why}")


def needs_assistant(model: Any) -> None:
    """Leave a test out whose assistant cannot draft with a cache of its own, which it makes in transformers' way."""
    layout = DynamicCache(config=model.config.get_text_config(decoder=True))
    if compat.VERSION < (5, 18) and True in layout.is_sliding:
        pytest.skip("before transformers 5.18 an assistant with sliding layers fails once its drafts fill the window")
