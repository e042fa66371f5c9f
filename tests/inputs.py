"""Deterministic inputs shared by the tests of the codec."""

from __future__ import annotations

import numpy as np

from mixkvq.config import BlockCodec, MixKVQConfig


def codec_of(head_dim: int = 64, dtype: str = "float32", preset: str = "default", **fields) -> BlockCodec:
    """The block codec of a preset with some fields replaced."""
    return MixKVQConfig.preset(preset, **fields).codec(head_dim, dtype)


def ramp(tokens: int, channels: int, seed: int = 0) -> np.ndarray:
    """float32 [tokens, channels] in [-4, 4) from integer arithmetic only: the same everywhere."""
    index = np.arange(tokens * channels, dtype=np.uint64).reshape(tokens, channels) + np.uint64(seed * 1000003)
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(40)).astype(np.float32) / np.float32(2**21) - np.float32(4)
