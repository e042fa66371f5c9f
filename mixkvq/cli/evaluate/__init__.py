"""``mixkvq eval``: what a quantized cache does to a model, one command per measurement (see `mixkvq.eval`)."""

from __future__ import annotations

from .app import app
from .kl import kl

__all__ = ["app", "kl"]
