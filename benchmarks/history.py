"""Long queries over packed history, as when a prompt is read in pieces: against torch on unpacked keys and values.

``python benchmarks/history.py`` prints milliseconds of attention of n new tokens, causal among themselves, over 4096
older tokens: ours over packed records and the exact window, torch's `scaled_dot_product_attention` in float32 over the
same tokens with heads repeated, as transformers calls it. Both take turns; best of many rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from flush import machine
from torch.nn.functional import scaled_dot_product_attention

from mixkvq import MixKVQConfig, _core, ops
from mixkvq.states import codec_of
from mixkvq.store import PackedStore

HISTORY = 4096
SHAPES = ((128, 8, 4), (64, 3, 3))
"""head_dim, KV heads, query heads per KV head."""


def cases(dim: int, heads: int, group: int, n: int, preset: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Our attention with a mask and with causal order, and torch's with the same mask."""
    config = MixKVQConfig.preset(preset)
    k, v = (torch.randn(1, heads, HISTORY + n, dim) for _ in range(2))
    old = k[:, :, :HISTORY], v[:, :, :HISTORY]
    store = PackedStore.begin(config, codec_of(config, *old), *old, torch.zeros(1, dtype=torch.int64))
    store.append(k[:, :, HISTORY:], v[:, :, HISTORY:])
    q = torch.randn(1, heads * group, n, dim)
    mask = torch.ones(n, HISTORY + n, dtype=torch.bool).tril(HISTORY)[None, None]
    keys, values, handle = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), store.core()
    return {
        "ours": lambda: ops.attend(handle, q, mask),
        "ours, causal": lambda: ops.attend(handle, q, None, True),
        "torch": lambda: scaled_dot_product_attention(q, keys, values, attn_mask=mask),
    }


def main() -> None:
    """Time all shapes and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--queries", nargs="+", type=int, default=[16, 128, 512])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{machine()}, {options.threads} thread(s), {_core.isa()}, `{options.preset}`, {HISTORY} tokens of history")
    print("| head_dim | KV heads | query heads | new tokens | ours, ms | ours, causal, ms | torch, ms | torch / ours |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for dim, heads, group in SHAPES:
        for n in options.queries:
            calls = cases(dim, heads, group, n, options.preset)
            best = dict.fromkeys(calls, float("inf"))
            for _ in range(options.rounds):
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call()
                    best[name] = min(best[name], time.perf_counter() - begin)
            times = " | ".join(f"{1e3 * best[name]:.1f}" for name in calls)
            print(f"| {dim} | {heads} | {heads * group} | {n} | {times} | {best['torch'] / best['ours']:.2f} |")


if __name__ == "__main__":
    main()
