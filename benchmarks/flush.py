"""What a flush costs: packing one block of one KV head, choice of bits included, on one thread.

``python benchmarks/flush.py`` prints microseconds per block of 128 tokens and head for every preset, head_dim and
instruction set: the best and the median of many rounds, in which all cases take turns. Keys have channels of unequal
width and offset, the key reference is known already (a cache computes it once), queries weigh the channels unequally.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mixkvq import MixKVQConfig, _core, arrays, list_presets
from mixkvq.reference import numbers

HEADS = 8
EXTRA = {"budget": {"allocate": "budget"}, "layer": {"allocate": "layer"}}
"""Systems beside the presets: `default` with another way to choose bits."""


def machine() -> str:
    """The processor's name, and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} processors)" if names else platform.processor()


def packer(system: str, head_dim: int, dtype: str) -> Callable[[], None]:
    """A call that packs one block of `HEADS` heads."""
    fields = EXTRA.get(system)
    config = MixKVQConfig.preset("default", **fields) if fields else MixKVQConfig.preset(system)
    codec = config.codec(head_dim, dtype)
    handle, rng = arrays.core_codec(codec), np.random.default_rng(1)
    shape, channel = (1, HEADS, codec.block_length, head_dim), (1, HEADS, 1, head_dim)
    width, middle = np.exp(rng.standard_normal(channel)), 2 * rng.standard_normal(channel)
    k = numbers.narrow((rng.standard_normal(shape) * width + middle).astype(np.float32), dtype)
    v = numbers.narrow(rng.standard_normal(shape).astype(np.float32), dtype)
    importance = np.exp(0.6 * rng.standard_normal((1, HEADS, head_dim))).astype(np.float32)
    room = np.zeros(HEADS * handle.record_bound + 64, np.uint8)
    out = room[-room.ctypes.data % 64 :][: HEADS * handle.record_bound]
    sizes, first, blocks = np.zeros((1, HEADS, 1), np.int64), np.zeros(1, np.int64), np.ones(1, np.int64)
    mu = has_mu = None
    if codec.key_reference:
        mu, has_mu = np.zeros((1, HEADS, head_dim), np.float16), np.zeros((1, HEADS), np.uint8)
    arguments = handle, k, v, first, blocks, importance, mu, has_mu, out, handle.record_bound, sizes, None
    return lambda: _core.pack(*arguments)


def main() -> None:
    """Time all cases and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = [name for name in list_presets() if name != "lossless"] + list(EXTRA)
    parser.add_argument("--systems", nargs="+", choices=known, default=known)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--isas", nargs="+", default=[name for name, supported in _core.isas() if supported])
    parser.add_argument("--dtype", choices=list(arrays.DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    cases = {
        (system, dim, isa): packer(system, dim, options.dtype)
        for system in options.systems
        for dim in options.head_dims
        for isa in options.isas
    }
    times: dict[tuple[str, int, str], list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, call in cases.items():
            _core.set_isa(case[2])
            call()  # the data is in the cache, as after the forward that made it
            begin = time.perf_counter()
            call()
            times[case].append((time.perf_counter() - begin) / HEADS * 1e6)
    _core.set_isa(None)
    print(f"{machine()}, one thread, {options.dtype}, 128-token blocks; microseconds per head block: best / median")
    print("| system | " + " | ".join(f"{isa}, d={dim}" for isa in options.isas for dim in options.head_dims) + " |")
    print("|---|" + "---:|" * (len(options.isas) * len(options.head_dims)))
    for system in options.systems:
        cells = [times[system, dim, isa] for isa in options.isas for dim in options.head_dims]
        print(f"| `{system}` | " + " | ".join(f"{min(c):.1f} / {statistics.median(c):.1f}" for c in cells) + " |")


if __name__ == "__main__":
    main()
