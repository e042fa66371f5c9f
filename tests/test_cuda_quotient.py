"""The quotient that CUDA kernels use in place of a division (csrc/cuda/octet.h), tried on every significand."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import emulator_build
import pytest

SOURCE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Quotients of the 2^23 floats from 1 to 2 and the scale (1024 + m) / 1024 that are not those of a division. */
long wrong(int m)
{
    const float scale = 1.0f + (float)m / 1024.0f, inverse = 1.0f / scale;
    long found = 0;
    for (uint32_t i = 0; i < 1u << 23; i++) {
        const uint32_t bits = 0x3f800000u | i;
        float x;
        memcpy(&x, &bits, 4);
        const float q = x * inverse;
        found += fmaf(fmaf(-q, scale, x), inverse, q) != x / scale;
    }
    return found;
}
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory):
    """The C function; skips where there is no compiler or no fused multiply-add, which fmaf would take minutes for."""
    if (problem := emulator_build.missing()) is not None:
        pytest.skip(problem)
    if not any(" fma " in line or " asimd " in line for line in Path("/proc/cpuinfo").read_text().splitlines()):
        pytest.skip("this CPU has no fused multiply-add")
    folder = tmp_path_factory.mktemp("quotient")
    (folder / "quotient.c").write_text(SOURCE)
    command = [*emulator_build.CXX, "-x", "c", "-std=c11", "-O3", "-march=native", "-ffp-contract=off",
               "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]  # fmt: skip
    subprocess.run([*command, str(folder / "quotient.c"), "-o", str(folder / "quotient.so")], check=True)
    function = ctypes.CDLL(str(folder / "quotient.so")).wrong
    function.restype = ctypes.c_long
    return function


def test_quotients_by_e5m3_scales_are_those_of_a_division(wrong):
    assert [wrong(128 * m) for m in range(8)] == [0] * 8


@pytest.mark.slow
def test_quotients_by_float16_scales_are_those_of_a_division(wrong):
    assert [wrong(m) for m in range(1024)] == [0] * 1024
