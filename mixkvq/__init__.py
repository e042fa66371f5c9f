"""MixKVQ: query-aware mixed-precision KV cache quantization (arXiv 2512.19206) with packed kernels.

``import mixkvq`` needs NumPy only; `MixKVQCache` and the attention hook load torch and transformers when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import MixKVQConfig, list_presets
from .errors import CacheFileError
from .version import __version__

if TYPE_CHECKING:
    from .attachment import attach, detach
    from .cache import MixKVQCache
    from .estimates import Estimate, estimate
    from .fitting import largest_batch, largest_tokens
    from .hook import install, uninstall

__all__ = [
    "CacheFileError",
    "Estimate",
    "MixKVQCache",
    "MixKVQConfig",
    "__version__",
    "attach",
    "detach",
    "estimate",
    "install",
    "largest_batch",
    "largest_tokens",
    "list_presets",
    "uninstall",
]

_LAZY = {
    "Estimate": "estimates",
    "MixKVQCache": "cache",
    "attach": "attachment",
    "detach": "attachment",
    "estimate": "estimates",
    "install": "hook",
    "largest_batch": "fitting",
    "largest_tokens": "fitting",
    "uninstall": "hook",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        import_module("torch")
        import_module(f"{__name__}.compat")  # first of ours: it says if transformers is too old
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(
                f"mixkvq.{name} needs {error.name}: pip install 'mixkvq[hf]' (torch >= 2.10, transformers >= 4.57)"
            ) from error
        raise
