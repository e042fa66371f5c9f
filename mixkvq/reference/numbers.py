"""Number formats and the order of sums (docs/format.md sections 3.3 and 4).

Everything is float32 with one rounding per operation: NumPy's element-wise float32 operations are exactly that as long
as no operand is float64, so constants are wrapped in `F32` and no sum is left to `numpy.sum`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = np.float32
Floats = NDArray[np.float32]
Array = NDArray[Any]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
"""NumPy has no bfloat16: arrays of it hold the bit patterns as uint16."""

E5M3 = np.array([2.0 ** (e - 24) * (1 + m / 8) for e in range(32) for m in range(8)]).astype(F32)
"""Value of every e5m3 byte ``8e + m``, ascending; all are exact in float32."""

_MIDPOINTS = (E5M3[1:].astype(np.float64) + E5M3[:-1].astype(np.float64)) / 2


def storage(x: Array, dtype: str) -> Array:
    """``x`` in the little-endian array type of ``dtype``.

    Raises
    ------
    TypeError
        If ``x`` has another element type.
    """
    kind = STORAGE[dtype]
    if x.dtype != kind and not (x.dtype == np.uint16 and kind.itemsize == 2):
        raise TypeError(f"array is {x.dtype}, must be {kind} for {dtype}")
    return np.ascontiguousarray(x).view(kind)


def widen(x: Array, dtype: str) -> Floats:
    """float32 values of an array in model storage; bfloat16 is the upper half of a float32."""
    x = storage(x, dtype)
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << np.uint32(16)).view(F32)
    return x.astype(F32)


def narrow(x: Floats, dtype: str) -> Array:
    """float32 rounded half to even to model storage; a bfloat16 NaN keeps its sign and upper payload and is quiet."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(STORAGE[dtype])
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(x), quiet, rounded).astype("<u2")


def e5m3_nearest(x: Floats) -> NDArray[np.int64]:
    """Byte of the e5m3 value nearest to x in [0, 240]; ties take the even mantissa, which is the even byte."""
    above = np.searchsorted(_MIDPOINTS, x.astype(np.float64), side="left")
    tie = _MIDPOINTS[np.minimum(above, 254)] == x
    return np.asarray(above + (tie & (above % 2 == 1)), np.int64)


def eight_sum(x: Floats) -> Floats:
    """Sum over axis 0 in the order of docs/format.md: eight partial sums from +0, then the fixed tree.

    Parameters
    ----------
    x : ndarray, float32, [n, ...]
        n is a multiple of 8.
    """
    partial = np.zeros((8, *x.shape[1:]), F32)
    for step in x.reshape(-1, 8, *x.shape[1:]):
        partial = partial + step
    s = partial
    return np.asarray(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])), F32)


def hadamard(x: Floats) -> Floats:
    """Sylvester-Hadamard transform of runs of ``2**p`` on the last axis (``m * 2**p``); nearly its own inverse."""
    dim = x.shape[-1]
    run = dim & -dim
    y = x.reshape(*x.shape[:-1], dim // run, run)
    stride = 1
    while stride < run:
        pair = y.reshape(*y.shape[:-1], run // (2 * stride), 2, stride)
        a, b = pair[..., 0, :], pair[..., 1, :]
        y = np.stack([a + b, a - b], axis=-2).reshape(y.shape)
        stride *= 2
    return np.asarray(y.reshape(x.shape) * F32(2.0 ** (-(run.bit_length() - 1) / 2)), F32)


def up64(n: int) -> int:
    """The next multiple of 64."""
    return -(-n // 64) * 64
