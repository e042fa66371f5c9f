"""``mixkvq eval``: what a quantized cache does to a model, one command per measurement (see `mixkvq.eval`)."""

from __future__ import annotations

from .app import app
from .dump import dump
from .generate import generate
from .kl import kl
from .layers import layers
from .lm_eval import lm_eval
from .operator import operator
from .recall import recall

__all__ = ["app", "dump", "generate", "kl", "layers", "lm_eval", "operator", "recall"]
