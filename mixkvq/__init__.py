"""MixKVQ: query-aware mixed-precision KV cache quantization (arXiv 2512.19206) with packed kernels.

``import mixkvq`` needs NumPy only; `MixKVQCache` and the attention hook load torch and transformers when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import MixKVQConfig, list_presets
from .version import __version__

if TYPE_CHECKING:
    from .cache import MixKVQCache
    from .hook import install, uninstall

__all__ = ["MixKVQCache", "MixKVQConfig", "__version__", "install", "list_presets", "uninstall"]

_LAZY = {"MixKVQCache": "cache", "install": "hook", "uninstall": "hook"}


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
