"""The emulator of the kernels' tests: what it computes, and that it and the sanitizers see what is wrong."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import emulator
import emulator_build
import numpy as np
import pytest

pytestmark = emulator.NEEDED
KERNELS = ("multiply", "lanes", "copies", "last", "mistake", "count_blocks")
MISTAKES = (
    "right", "no barrier", "no lane barrier", "no order", "beyond shared", "beyond global", "early end",
    "missed barrier", "foreign mask", "other masks", "left copies", "early read", "odd address",
)  # fmt: skip

ALONE = """
import ctypes, json, sys
library, which, blocks, threads, shared, given, out, n = json.loads(sys.argv[1])
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
words = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 * count))) for count in (given, out)]
for pointer, count in zip(words, (given, out)):
    ctypes.memset(pointer, 0, 4 * count)
sys.exit(ctypes.CDLL(library).run_kernel(which, ctypes.c_int64(blocks), threads, shared, *words, n))
"""


def build(variant: str = "plain") -> Path:
    sources = [Path(__file__).with_name("emulator_kernels.cu"), emulator_build.ROOT / "csrc/status.c"]
    return emulator_build.build(variant, name="emulator_kernels", sources=sources)


@cache
def loaded() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def run(kernel: str, threads: int, given: np.ndarray, out: np.ndarray, *, blocks: int = 1, shared: int = 0, n: int = 0):
    return loaded().run_kernel(
        KERNELS.index(kernel), ctypes.c_int64(blocks), threads, shared,
        ctypes.c_void_p(given.ctypes.data), ctypes.c_void_p(out.ctypes.data), n,
    )  # fmt: skip


def alone(
    kernel: str,
    blocks: int = 1,
    threads: int = 64,
    shared: int = 256,
    given: int = 64,
    out: int = 64,
    *,
    n: int,
    variant: str = "plain",
    seed: int = 1,
):
    """A kernel in a process of its own, which it may stop; ``given`` and ``out`` are the lengths of its arrays."""
    try:
        environment = emulator_build.environment(variant)
    except FileNotFoundError as error:
        pytest.skip(str(error))
    job = [str(build(variant)), KERNELS.index(kernel), blocks, threads, shared, given, out, n]
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE, json.dumps(job)],
        env=os.environ | environment | {"MKVQ_EMULATE_SEED": str(seed)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def mistake(name: str, **fields) -> subprocess.CompletedProcess[str]:
    return alone("mistake", n=MISTAKES.index(name), **fields)


# ---- what it computes ----------------------------------------------------------------------------------------------
def test_products_of_matrices():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)
    d = rng.standard_normal((16, 8)).astype(np.float32)
    a[3, 4], b[5, 6] = 2.0**-24, -3 * 2.0**-24  # subnormal: not flushed
    lanes = list(zip(*np.divmod(np.arange(32), 4), strict=True))
    registers = [a[r, c : c + 2] for g, j in lanes for c in (2 * j, 2 * j + 8) for r in (g, g + 8)]
    registers += [b[r : r + 2, g] for g, j in lanes for r in (2 * j, 2 * j + 8)]
    where = [(r, 2 * j + i) for g, j in lanes for r in (g, g + 8) for i in (0, 1)]
    given = np.ascontiguousarray(registers).view(np.uint32).ravel()
    out = np.array([d[at] for at in where], np.float32)
    assert run("multiply", 32, given, out) == 0
    expected = d.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(out - [expected[at] for at in where]).max() < 1e-5


def test_lanes_see_each_other():
    given = np.random.default_rng(1).integers(0, 2**32, 96, dtype=np.uint32)
    given[50], given[given == 8] = 7, 0
    out = np.zeros((96, 4), np.uint32)
    assert run("lanes", 96, given, out) == 0
    warps, lane = given.reshape(3, 32), np.arange(32)
    assert (out[:, 0].reshape(3, 32) == warps[:, (lane + 1) % 32]).all()
    assert (out[:, 1].reshape(3, 32) == warps[:, lane ^ 5]).all()
    bits = (warps & 1) << lane.astype(np.uint32)
    halves = np.stack([bits[:, :16].sum(1), bits[:, 16:].sum(1)], 1)
    assert (out[:, 2].reshape(3, 2, 16) == halves[:, :, None]).all()
    assert (out[:, 3] == 1).all()


def test_copies_arrive_when_waited_for():
    given = np.random.default_rng(2).integers(0, 2**20, (7, 64, 4), dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    assert run("copies", 64, given, out, shared=3 * 64 * 16, n=7) == 0
    assert (out == np.roll(given.sum((0, 2), dtype=np.uint32), -1)).all()


def test_the_last_block_sees_what_the_others_wrote():
    given, out = np.arange(1, 31, dtype=np.uint32), np.zeros(32, np.uint32)
    assert run("last", 32, given, out, blocks=30, shared=4) == 0
    assert out[0] == given.sum()


def test_sizes_that_a_device_refuses():
    given, out = np.zeros((2, 64), np.uint32)
    shape_error = 3
    for threads, other in ((2048, {}), (33, {}), (32, {"blocks": 0}), (32, {"shared": 100 * 1024})):
        assert run("lanes", threads, given, out, **other) == shape_error


# ---- what it sees ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("early end", r"waits in sync_block, but threads have ended|ends while others wait in sync_block"),
        ("missed barrier", r"all threads wait: not all of them have come to the same barrier\n(.*\n)*  thread 3 waits"),
        ("foreign mask", "is not in its own mask of lanes"),
        ("other masks", "lanes disagree about who takes part"),
        ("left copies", "ends with copies that nobody waited for"),
        ("odd address", "copies to or from an address that is no multiple of 16"),
    ],
)
def test_what_a_gpu_leaves_undefined_stops_the_process(name, message, seed):
    done = mistake(name, seed=seed)
    assert done.returncode < 0
    assert re.search(r"^emulator: block \(0, 0, 0\), thread \d+: " + f"({message})", done.stderr), done.stderr


def test_a_copy_that_is_read_too_early_is_not_there():
    given, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    assert run("mistake", 64, given, out, shared=256, n=MISTAKES.index("early read")) == 0
    assert (out[::4] == 0xFFFFFFFF).all()


# ---- what the sanitizers see ---------------------------------------------------------------------------------------
RIGHT = {
    "multiply": {"threads": 32, "given": 192, "out": 128},
    "lanes": {"threads": 96, "given": 96, "out": 384},
    "copies": {"given": 7 * 256, "shared": 3 * 1024, "n": 7},
    "last": {"blocks": 9, "threads": 32, "shared": 4},
    "mistake": {},
    "count_blocks": {"blocks": 9, "threads": 32},
}


@pytest.mark.parametrize("variant", ["thread", "address"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_is_found_in_what_is_right(kernel, variant):
    done = alone(kernel, variant=variant, **{"n": 0, **RIGHT[kernel]})
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["no barrier", "no lane barrier"])
def test_a_race_within_a_block_is_found(name):
    done = mistake(name, variant="thread")
    assert done.returncode == 66
    assert "ThreadSanitizer: data race" in done.stderr


def test_a_race_between_blocks_is_found():
    done = alone("count_blocks", 2, 32, n=MISTAKES.index("no order"), variant="thread")
    assert done.returncode == 66
    assert "ThreadSanitizer: data race" in done.stderr
    done = alone("mistake", 2, n=MISTAKES.index("right"), variant="thread")  # both write the same words
    assert done.returncode == 66


@pytest.mark.parametrize("name", ["beyond shared", "beyond global"])
def test_an_access_beyond_the_end_is_found(name):
    done = mistake(name, variant="address")
    assert done.returncode == 66
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
