"""``mixkvq eval``: what a quantized cache does to a model, one command per measurement (see `mixkvq.eval`)."""

from __future__ import annotations

from .app import app
from .dump import dump
from .kl import kl
from .layers import layers
from .operator import operator

__all__ = ["app", "dump", "kl", "layers", "operator"]
