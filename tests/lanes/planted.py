"""Calls the core as the bugs that sanitize.sh plants need it: packs blocks, checks records, and attends in runs that
two threads take at once. Without a bug the result is that of one thread."""

from __future__ import annotations

import ctypes
import threading

import numpy as np

from mixkvq import MixKVQConfig, _core, arrays

BODY = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
def pool(begin: int, end: int, grain: int, body: object, ctx: int) -> int:
    middle = (begin + end) // 2
    halves = [threading.Thread(target=body, args=(*half, ctx)) for half in ((begin, middle), (middle, end))]
    for half in halves:
        half.start()
    for half in halves:
        half.join()
    return 0


k, v = np.random.default_rng(0).standard_normal((2, 1, 1, 64 * 21, 64)).astype(np.float32)
packed = arrays.pack(MixKVQConfig.preset("default", block_length=64, residual_length=64).codec(64, "float32"), k, v)
q, window, tail = k[:, :, :64], k[:, :, :9], v[:, :, :9]
alone = arrays.attend(q, packed.records, window, tail, [9], mu=packed.mu)
_core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value or 0)
# several turns: the interpreter's lock may put what two threads do in one of them in order
turns = [arrays.attend(q, packed.records, window, tail, [9], mu=packed.mu) for _ in range(10)]
assert all((turn == alone).all() for turn in turns)
print("planted.py: the same from two threads,", _core.isa())
