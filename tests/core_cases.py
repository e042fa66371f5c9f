"""Random codecs and inputs for the tests that compare the C core with the oracle."""

from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mixkvq.config import BlockCodec, MixKVQConfig
from mixkvq.reference import numbers

HEAD_DIMS = (8, 16, 24, 64, 80, 96, 112, 128, 192, 256)
DTYPES = ("float32", "float16", "bfloat16")
TROUBLES = (
    "constant", "nearly constant", "zero", "negative zero", "signed zeros", "subnormal", "tiny", "outlier 1e4",
    "outlier 1e8", "outlier 1e30", "all huge", "integers", "halves", "two values", "offset 1000", "offset 1e6",
    "full range",
)  # fmt: skip


SHARE = float(os.environ.get("MIXKVQ_EXAMPLES") or 1)
"""Share of the hypothesis examples that are run: less than 1 where a machine is emulated."""


def examples(count: int, *, fixed: bool = True) -> settings:
    """Hypothesis settings: ``count`` examples, the same ones in every run unless ``fixed`` is False."""
    return settings(
        max_examples=math.ceil(count * SHARE), derandomize=fixed, deadline=None, suppress_health_check=list(HealthCheck)
    )


@st.composite
def menus(draw: st.DrawFn, head_dim: int) -> tuple[tuple[int, ...], ...]:
    """One to four patterns of any split of the channels, whole columns or not."""
    menu = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.lists(st.integers(0, head_dim), min_size=5, max_size=5)))
        split = np.diff([0, *cuts, head_dim])
        menu.append(tuple(int(n) for n in np.array(split)[draw(st.permutations(range(6)))]))
    return tuple(menu)


@st.composite
def codecs(
    draw: st.DrawFn, head_dims: tuple[int, ...] = HEAD_DIMS, lengths: tuple[int, ...] = (32, 64, 96, 128)
) -> BlockCodec:
    """Any mix of fields that makes a coded record possible."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    head_dim, length = pick(*head_dims), pick(*lengths)
    low = pick(0.0, 0.3, 0.79, 2.0)
    config = MixKVQConfig(
        block_length=length,
        residual_length=length,
        key_budget=4.0,
        allocate=pick("patterns", "patterns", "threshold", "budget", "layer"),
        pattern_cost=pick("model", "measured"),
        thresholds=(low * pick(1.0, 1.82, 4.0), low),
        key_range=pick("minmax", "search", "search-mse"),
        key_group_size=32,
        key_metadata=pick("e5m3", "fp16"),
        key_reference=pick("static", "none"),
        value_bits=pick(1, 2, 3, 4, 8, 16),
        value_group_size=pick(0, 0, 8, 16, 24, 32, 64),
        value_range=pick("minmax", "search", "search-mse"),
        value_metadata=pick("e5m3", "fp16"),
        value_basis=pick("hadamard", "identity"),
    )
    groups = [g for g in range(8, length + 1, 8) if length % g == 0]
    codec = dataclasses.replace(config.codec(head_dim, pick(*DTYPES)), key_group=pick(*groups))
    if codec.allocate in ("budget", "layer"):
        return dataclasses.replace(codec, budget_columns=draw(st.integers(-(-head_dim // 32), head_dim // 4)))
    return dataclasses.replace(codec, patterns=draw(menus(head_dim)))


def _trouble(rng: np.random.Generator, x: np.ndarray, name: str) -> np.ndarray:
    """One channel (or one token's values) with something unusual."""
    signs = rng.choice([-1.0, 1.0], x.shape)
    kind, _, size = name.partition(" ")
    x = np.clip(x, -1e30, 1e30)  # of a line that an earlier trouble has hit
    if kind in ("constant", "all"):
        return np.full_like(x, rng.choice([0.1, 100, -3e3]) if kind == "constant" else 3e38)
    if kind == "nearly":
        return np.where(rng.random(x.shape) < 0.03, np.nextafter(np.float32(7.7), np.float32(8)), np.float32(7.7))
    if kind == "outlier":
        return np.where(np.arange(x.size) == rng.integers(x.size), rng.choice([-1, 1]) * float(size), x)
    if kind == "offset":
        return x + rng.choice([-1, 1]) * float(size)
    plain = {
        "zero": 0 * x,
        "negative zero": np.full_like(x, -0.0),
        "signed zeros": 0.0 * signs,
        "subnormal": x * 1e-40,
        "tiny": x * 2.0**-26,
        "integers": np.rint(4 * x),
        "halves": np.rint(4 * x) / 2 + 0.25,
        "two values": signs * 1.5,
        "full range": signs * 3.3e38,  # max - min overflows
    }
    return plain[name]


def fill(rng: np.random.Generator, shape: tuple[int, ...], troubles: list[str], along: int) -> np.ndarray:
    """float32 [B,H,n,D]: channels of different width and offset; each trouble hits a few lines along axis 2 or 3."""
    channel = (*shape[:2], 1, shape[3])
    x = rng.standard_normal(shape) * np.exp(rng.standard_normal(channel)) + 2 * rng.standard_normal(channel)
    x = x.astype(np.float32)
    lines = np.moveaxis(x, along, -1)
    for name in troubles:
        for _ in range(rng.integers(1, 4)):
            at = tuple(rng.integers(size) for size in lines.shape[:-1])
            lines[at] = _trouble(rng, lines[at], name)
    return x


def strided(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The same numbers as a view: contiguous, heads behind tokens, cut from something wider, every second one, any."""
    style = rng.integers(5)
    if style == 4:  # axes in any order in memory, each forwards or backwards, with gaps
        order, step, begin = rng.permutation(x.ndim), rng.integers(1, 4, x.ndim), rng.integers(0, 3, x.ndim)
        wide = np.zeros((begin + step * x.shape)[order], x.dtype).transpose(np.argsort(order))
        view = wide[tuple(slice(b, b + s * n, s) for b, s, n in zip(begin, step, x.shape, strict=True))]
        view = view[tuple(slice(None, None, way) for way in rng.choice([-1, 1], x.ndim))]
        view[...] = x
        return view
    if style == 1:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    if style == 2:
        wide = np.zeros((x.shape[0], x.shape[2], x.shape[1] + 2, x.shape[3] + 3), x.dtype).transpose(0, 2, 1, 3)
        wide[:, 1:-1, :, 2:-1] = x
        return wide[:, 1:-1, :, 2:-1]
    if style == 3:
        wide = np.zeros((*x.shape[:3], 2 * x.shape[3]), x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def narrowed(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rounded to model storage; what overflows float16 is clipped, so that only asked-for infinities appear."""
    if dtype == "float16":
        x = np.where(np.isfinite(x), np.clip(x, -65504, 65504), x).astype(np.float32)
    elif dtype == "bfloat16":
        x = np.where(np.isfinite(x), np.clip(x, -3.38e38, 3.38e38), x).astype(np.float32)
    return numbers.narrow(x, dtype)
