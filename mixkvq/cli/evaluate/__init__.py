"""``mixkvq eval``: what a quantized cache does to a model, one command per measurement (see `mixkvq.eval`)."""

from __future__ import annotations

from .app import app
from .generate import generate
from .kl import kl
from .lm_eval import lm_eval
from .recall import recall

__all__ = ["app", "generate", "kl", "lm_eval", "recall"]
