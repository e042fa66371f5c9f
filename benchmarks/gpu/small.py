"""Every call of `mixkvq._cuda` once or more on small arrays, each compared with the CPU core: what sanitizers watch.

Needs ``tests`` on the path (`emulator`, `on_device`) and MIXKVQ_EMULATOR=device; with "copies" it runs the emulated
kernels. No torch, so that only our kernels run.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator

import emulator
import numpy as np

from mixkvq import MixKVQConfig, arrays
from mixkvq.config import BlockCodec
from mixkvq.reference import numbers

BLOCK = 64
BOUND = 2e-3

# preset, head_dim, dtype, query heads per KV head, queries
CASES = (
    ("default", 128, "bfloat16", 4, 1),
    ("compact", 64, "float16", 1, 1),
    ("near-lossless", 80, "float32", 2, 3),
    ("paper", 128, "float16", 8, 1),
    ("kivi-2", 96, "bfloat16", 16, 1),
    ("kivi-4", 256, "bfloat16", 2, 2),
    ("default", 192, "float16", 3, 16),
)


def states(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """[B, H, n, D] with channels of unequal width and offset."""
    channel = (*shape[:2], 1, shape[3])
    x = rng.standard_normal(shape) * np.exp(0.6 * rng.standard_normal(channel)) + rng.standard_normal(channel)
    return numbers.narrow(x.astype(np.float32), dtype)


def codec_of(preset: str, head_dim: int, dtype: str) -> BlockCodec:
    """The preset with short blocks."""
    config = MixKVQConfig.preset(preset)
    group = min(config.key_group_size, BLOCK)
    return dataclasses.replace(config, block_length=BLOCK, key_group_size=group).codec(head_dim, dtype)


def must(condition: bool, what: str) -> None:
    """Ends the program where a result is wrong."""
    if not condition:
        sys.exit(f"small: {what} differs from the CPU core")


def check(preset: str, head_dim: int, dtype: str, group: int, n: int, seed: int) -> Iterator[str]:
    """One codec through all calls; yields the name of each when it was right."""
    rng, heads, name = np.random.default_rng(seed), 2, f"{preset}, {head_dim}, {dtype}"
    codec = codec_of(preset, head_dim, dtype)
    k, v = (states(rng, (2, heads, 3 * BLOCK + 7, head_dim), dtype) for _ in "kv")
    q = states(rng, (2, heads * group, n, head_dim), dtype)

    sums = emulator.salience(q, heads, power=2)
    must((sums == arrays.salience(q, heads, power=2)).all(), f"salience ({name})")
    yield "salience"

    weights = np.sqrt(sums / (group * n)).astype(np.float32)
    options = {"first": [3, 0], "blocks": [2, 3], "importance": weights}
    mine, theirs = emulator.pack(codec, k, v, **options), arrays.pack(codec, k, v, **options)
    must(mine.records == theirs.records and (mine.raised == theirs.raised).all(), f"pack ({name})")
    yield "pack"

    packed = emulator.Packed(theirs.records, head_dim, mu=theirs.mu)
    decoded = [np.zeros_like(k), np.zeros_like(v)]
    emulator.unpack_into(packed, *decoded, [3, 0])
    for b, h, j in np.ndindex(2, heads, 3):
        if j < len(theirs.records[b][h]):
            mu = None if theirs.mu is None else theirs.mu[b, h]
            want = arrays.unpack(theirs.records[b][h][j], mu=mu, dtype=dtype)
            begin = (3, 0)[b] + j * BLOCK
            for got, x in zip(decoded, want, strict=True):
                must(got[b, h, begin : begin + BLOCK].tobytes() == x.tobytes(), f"unpack ({name})")
    yield "unpack"

    windows = [np.ascontiguousarray(x[:, :, :40]) for x in (k, v)]
    exact, new = np.array([9, 24]), [np.ascontiguousarray(x[:, :, -n:]) for x in (k, v)]
    emulator.append(*windows, exact, *new)
    must(exact.tolist() == [9 + n, 24 + n], f"append ({name})")
    for window, x, old in zip(windows, new, (k, v), strict=True):
        for b, begin in enumerate((9, 24)):
            must(window[b, :, begin : begin + n].tobytes() == x[b].tobytes(), f"append ({name})")
            must(
                window[b, :, :begin].tobytes() == np.ascontiguousarray(old[b, :, :begin]).tobytes(), f"append ({name})"
            )
    yield "append"

    window = {"exact": exact, "sink_length": 4, "mask": "causal"}
    got = emulator.attend(q, packed, *windows, **window)
    exactly = arrays.attend(q, theirs.records, *windows, mu=theirs.mu, precision="exact", **window)
    error = np.linalg.norm(got - exactly) / np.linalg.norm(exactly)
    must(bool(error <= BOUND), f"attend ({name}, relative error {error:.3g})")
    yield "attend"


def main(arguments: list[str] | None = None) -> None:
    """All cases, as far as time allows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=len(CASES))
    options = parser.parse_args(arguments)
    end, done = time.monotonic() + options.seconds, 0
    for seed, case in enumerate(CASES[: options.cases]):
        if seed and time.monotonic() > end:
            break
        done += len(list(check(*case, seed)))
    print(f"small: {done} calls right")


if __name__ == "__main__":
    main()
