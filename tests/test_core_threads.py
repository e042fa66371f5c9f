"""The same records whatever the number of threads, and who gets which unit of work."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_core = pytest.importorskip("mixkvq._core", reason="the C core is not built")
LEVELS = [name for name, supported in _core.isas() if supported]

POOL = """
import ctypes, threading
import numpy as np
from mixkvq import MixKVQConfig, _core, arrays

Body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
threads, loops = 1, []


@ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Body, ctypes.c_void_p)
def pool(begin, end, grain, body, ctx):
    loops.append(end)
    each = max(grain, -(-end // threads))
    workers = [threading.Thread(target=body, args=(at, min(at + each, end), ctx)) for at in range(0, end, each)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return 0


rng = np.random.default_rng(3)
k, v = rng.standard_normal((2, 2, 3, 6 * 64 + 5, 64)).astype(np.float32)
k += 3 * rng.standard_normal((2, 3, 1, 64)).astype(np.float32)
k[0, 1, 70, 5] = np.nan  # head 1 of row 0: block 0 is coded, block 1 exact
v[1, 2, 3:133, 7] = np.inf  # head 2 of row 1: no reference before block 3
k[1, 0, :, 0] = np.inf  # head 0 of row 1: never one
importance = np.exp(rng.standard_normal((2, 3, 64))).astype(np.float32)


def pack(codec, **state):
    return arrays.pack(codec, k, v, first=[0, 5], blocks=[5, 6], importance=importance, **state)


def same(a, b):
    if a.records != b.records or (a.raised != b.raised).any():
        return False
    return a.mu is None or a.mu.tobytes() + a.has_mu.tobytes() == b.mu.tobytes() + b.has_mu.tobytes()
"""

CASES = """
for preset, fields in (("default", {}), ("default", {"allocate": "layer"}), ("default", {"allocate": "budget"}),
                       ("paper", {}), ("kivi-2", {}), ("lossless", {})):
    codec = MixKVQConfig.preset(preset, block_length=64, residual_length=64, **fields).codec(64, "float32")
    _core.set_executor_address(0)
    alone = pack(codec)
    again = pack(codec, mu=alone.mu, has_mu=alone.has_mu)
    _core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value)
    for threads in (1, 2, 3, 7):
        loops.clear()
        assert same(pack(codec), alone), (preset, fields, threads)
        heads = 1 if fields.get("allocate") == "layer" else 3
        rounds = [2 * heads, 2 * heads * 6] if codec.key_reference and preset != "lossless" else [2 * heads * 6]
        assert loops == rounds, (preset, fields, loops)
        assert same(pack(codec, mu=alone.mu, has_mu=alone.has_mu), again), (preset, fields, threads)
    print(preset, fields, alone.has_mu is not None and alone.has_mu.tolist())
"""


def python(code: str) -> str:
    """What the code prints in a fresh interpreter, whose executor is its own."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], env=os.environ, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("isa", LEVELS)
def test_packing_gives_the_same_bytes_for_any_number_of_threads(isa, monkeypatch):
    """Two rounds with a reference: heads until they have it, then blocks; else blocks at once."""
    monkeypatch.setenv("MIXKVQ_ISA", isa)
    lines = python(POOL + CASES).splitlines()
    assert len(lines) == 6
    assert lines[0].endswith("[[1, 1, 1], [0, 1, 1]]")


ATTEND = """
import itertools

for preset, precision in itertools.product(("default", "lossless"), ("default", "exact", "fast")):
    codec = MixKVQConfig.preset(preset, block_length=64, residual_length=64).codec(64, "float32")
    keys = rng.standard_normal((1, 3, 64 * 21, 64)).astype(np.float32)
    packed = arrays.pack(codec, keys, -keys, first=[0], blocks=[21])
    q = rng.standard_normal((1, 12, 5, 64)).astype(np.float32)

    def attend():
        return arrays.attend(
            q, packed.records, keys[:, :, :70], keys[:, :, 5:75], [70], mu=packed.mu, sink_length=4, mask="causal",
            precision=precision,
        )

    _core.set_executor_address(0)
    alone = attend()
    _core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value)
    for threads in (1, 2, 3, 7):
        loops.clear()
        assert attend().tobytes() == alone.tobytes(), (preset, precision, threads)
        assert loops == [3 * 3 * 3], loops
    print("same")
"""


@pytest.mark.parametrize("isa", LEVELS)
def test_attention_gives_the_same_bytes_for_any_number_of_threads(isa, monkeypatch):
    """Three heads, three tiles of query rows each, cut into three runs of blocks."""
    monkeypatch.setenv("MIXKVQ_ISA", isa)
    assert python(POOL + ATTEND).split() == ["same"] * 6


CALLERS = """
codec = MixKVQConfig.preset("default", block_length=64, residual_length=64).codec(64, "float32")
keys = rng.standard_normal((1, 3, 64 * 21, 64)).astype(np.float32)
window, q = keys[:, :, :70], rng.standard_normal((1, 12, 5, 64)).astype(np.float32)


def call(factor):
    packed = arrays.pack(codec, keys * factor, -keys, first=[0], blocks=[21])
    out = arrays.attend(q, packed.records, window, window, [70], mu=packed.mu, mask="causal")
    return packed.records, out.tobytes(), arrays.salience(q, 3, power=2).tobytes()


alone = [call(factor) for factor in range(1, 5)]
_core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value)
threads, together, begin = 3, [[] for _ in alone], threading.Barrier(len(alone))


def caller(i):
    begin.wait()
    for turn in range(3):
        together[i].append(call(i + 1))


callers = [threading.Thread(target=caller, args=(i,)) for i in range(len(alone))]
for each in callers:
    each.start()
for each in callers:
    each.join()
assert together == [[one] * 3 for one in alone]
print("callers", len(callers), "loops", len(loops))
"""


@pytest.mark.parametrize("isa", LEVELS)
def test_callers_at_once_do_not_see_each_other(isa, monkeypatch):
    """Four threads of Python, each with a pool of three: two rounds of packing and one of attention per call."""
    monkeypatch.setenv("MIXKVQ_ISA", isa)
    assert python(POOL + CALLERS).split() == ["callers", "4", "loops", str(4 * 3 * 3)]
