"""One shape of attention, a few launches and nothing else: what a profiler is pointed at.

``ncu --clock-control none --kernel-name regex:attend -c 1 python -m gpu.one --preset default``
"""

from __future__ import annotations

import argparse

import torch

from mixkvq import ops

from . import attention, data


def main(arguments: list[str] | None = None) -> None:
    """Pack a history, attend to it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="default")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--group", type=int, default=4, help="query heads per KV head")
    parser.add_argument("--rows", type=int, help="of the batch; default: a gigabyte of records")
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    rows = options.rows or attention.batch_for(options.head_dim, options.tokens, device)
    packed = data.Packed.of(options.preset, *data.states(rows, options.tokens, options.head_dim, device))
    q = data.queries(rows, options.group, options.head_dim, device)
    for _ in range(options.launches):
        ops.attend(packed.store.core(), q)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"== {options.preset}: {rows} rows of {options.tokens} tokens, {packed.nbytes / 1e9:.3f} GB to be read")


if __name__ == "__main__":
    main()
