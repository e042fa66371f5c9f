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


def beside_ties(seed: int, width: int, size: int) -> tuple[BlockCodec, np.ndarray, np.ndarray]:
    """A codec of ``width`` bits and keys and values [1, 1, size, size] a few units in the last place off half a step.

    The scales are some whose reciprocal is not exact.
    """
    rng = np.random.default_rng(seed)
    codec = codec_of(size, block_length=size, residual_length=size, key_group_size=size, key_reference="none",
                     value_basis="identity", value_bits=width, key_patterns=({width: 64},))  # fmt: skip
    scale = (2.0 ** rng.integers(-12, 5, size) * (1 + rng.integers(0, 8, size) / 8)).astype(np.float32)
    offset = np.rint(rng.uniform(-127, 127, size)).astype(np.float32) * scale * np.float32(2.0 ** (width - 4))
    codes = rng.integers(0, 2**width - 1, (size, size)) + np.float32(0.5)
    x = (codes.astype(np.float32) * scale + offset).view(np.int32)
    x = (x + rng.integers(-2, 3, (size, size)).astype(np.int32)).view(np.float32)
    x[0], x[1] = offset, np.float32(2**width - 1) * scale + offset
    return codec, x[None, None], np.ascontiguousarray(x.T)[None, None]
