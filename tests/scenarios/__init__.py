"""What people do with a cache. Every scenario is tried on every family by `test_matrix.py`.

A scenario runs something with `DynamicCache`, with our ``lossless`` preset, which must give the same, and quantized,
with few and with many bits; `judging` says what must be true of these.
"""

from . import computing, generating, judging, moving, padding, reading
from .case import SCENARIOS, Case

__all__ = ["SCENARIOS", "Case", "computing", "generating", "judging", "moving", "padding", "reading"]
