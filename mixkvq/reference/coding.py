"""Coding groups: ranges, stored scale and offset, codes (docs/format.md section 4, "Coding a group")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .numbers import E5M3, F32, Array, Floats, e5m3_nearest, eight_sum

RATIOS: dict[int, tuple[float, ...]] = {
    1: (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    2: (1, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44),
    3: (1, 0.93, 0.86, 0.79, 0.72, 0.65),
    4: (1, 0.94, 0.88, 0.8),
    8: (1,),
}
WEIGHTS = {"minmax": F32(15), "search": F32(15), "search-mse": F32(0)}
"""Weight of the error along the group, beyond its squared error, by range rule."""


@dataclass
class Coded:
    """Groups coded with one width; ``...`` is whatever follows the group axis of the input."""

    codes: NDArray[np.uint8]
    """[n, ...]"""
    scale: Floats
    """[...] as stored, widened"""
    offset: Floats
    """[...] as stored, widened"""
    raw_scale: Array
    """[...] bits to store: uint8 e5m3 bytes or float16"""
    raw_offset: Array
    """[...] int8 or float16"""
    error: Floats
    """[...] what the choices minimise: squared error, and more for the part of it along the group"""
    fits: NDArray[np.bool_]
    raised: NDArray[np.bool_]


def unit_of(scale: Floats, bits: int) -> Floats:
    """Worth of one step of an int8 offset."""
    return np.asarray(scale * F32(2.0 ** min(bits - 4, 2)), F32)


def offset_of(raw_scale: Array, raw_offset: Array, bits: int) -> tuple[Floats, Floats]:
    """Scale and offset in float32 from the stored ones (uint8 and int8, or float16 twice)."""
    if raw_scale.dtype == np.uint8:
        scale = E5M3[raw_scale]
        return scale, np.asarray(raw_offset.astype(F32) * unit_of(scale, bits), F32)
    return raw_scale.astype(F32), raw_offset.astype(F32)


def _e5m3_metadata(raw: Floats, lo: Floats, bits: int) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
    fits = raw <= F32(240)  # false for NaN
    byte = e5m3_nearest(np.where(fits, raw, F32(1)))
    first = byte.copy()
    while True:
        k = np.rint(lo / unit_of(E5M3[byte], bits))
        over = fits & ~(np.abs(k) <= F32(127))
        if not over.any():
            break
        fits = fits & ~(over & (byte == 255))
        byte = np.where(over & (byte < 255), byte + 1, byte)
    k = np.where(fits, k, F32(0))
    return byte.astype(np.uint8), k.astype(np.int8), fits, byte != first


def _fp16_metadata(raw: Floats, lo: Floats) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
    scale = np.maximum(raw.astype(np.float16), np.float16(2.0**-24))
    offset = lo.astype(np.float16)
    fits = np.isfinite(scale) & np.isfinite(offset)
    return scale, offset, fits, np.zeros(fits.shape, bool)


def _candidate(
    x: Floats, bits: int, metadata: str, span: Floats, lo: Floats, flat: NDArray[np.bool_], weight: np.float32
) -> Coded:
    """One candidate range for every group; groups that it does not fit carry meaningless codes."""
    levels = F32(2**bits - 1)
    raw = np.asarray(span / levels, F32)
    lo = np.where(lo == 0, F32(0), lo)
    if metadata == "e5m3":
        raw_scale, raw_offset, fits, raised = _e5m3_metadata(raw, lo, bits)
    else:
        raw_scale, raw_offset, fits, raised = _fp16_metadata(raw, lo)
    scale, offset = offset_of(raw_scale, raw_offset, bits)
    safe_scale, safe_offset = np.where(fits, scale, F32(1)), np.where(fits, offset, F32(0))
    codes = np.clip(np.rint((x - safe_offset) / safe_scale), F32(0), levels)
    if metadata == "fp16":
        codes = np.where(flat, F32(0), codes)
    codes = np.where(fits, codes, F32(0))
    error = _weighted_error(x, x - (codes * safe_scale + safe_offset), weight)
    return Coded(codes.astype(np.uint8), scale, offset, raw_scale, raw_offset, error, fits, raised)


def _weighted_error(x: Floats, miss: Floats, weight: np.float32) -> Floats:
    away = x - eight_sum(x) / F32(len(x))
    energy, along = eight_sum(away * away), eight_sum(miss * away)
    share = np.where(energy > 0, along / energy * along, F32(0))
    return np.asarray(eight_sum(miss * miss) + weight * share, F32)


def _keep(best: Coded, new: Coded) -> None:
    """Replace in ``best`` the groups that ``new`` codes strictly better, or that nothing fitted so far."""
    wins = new.fits & (~best.fits | (new.error < best.error))
    for name in ("codes", "scale", "offset", "raw_scale", "raw_offset", "error", "fits", "raised"):
        setattr(best, name, np.where(wins, getattr(new, name), getattr(best, name)))


def code_groups(x: Floats, bits: int, range_rule: str, metadata: str) -> Coded:
    """Code every group ``x[:, i, j, ...]``.

    Parameters
    ----------
    x : ndarray, float32, [n, ...]
        n is a multiple of 8.
    bits : {1, 2, 3, 4, 8}
    range_rule : {"minmax", "search", "search-mse"}
    metadata : {"e5m3", "fp16"}
    """
    weight = WEIGHTS[range_rule]
    with np.errstate(all="ignore"):
        high, low = x.max(axis=0), x.min(axis=0)
        flat = np.asarray(high == low)
        if range_rule == "minmax":
            return _candidate(x, bits, metadata, np.asarray(high - low, F32), low, flat, weight)
        mid, half = (high + low) * F32(0.5), (high - low) * F32(0.5)
        best: Coded | None = None
        for ratio in map(F32, RATIOS[bits]):
            new = _candidate(x, bits, metadata, (F32(2) * ratio) * half, mid - ratio * half, flat, weight)
            if best is None:
                best = new
            else:
                _keep(best, new)
        assert best is not None
        return best


def values_of(codes: Array, scale: Floats, offset: Floats) -> Floats:
    """``float32(code * scale) + offset``; scale and offset broadcast over axis 0 of codes."""
    return np.asarray(codes.astype(F32) * scale + offset, F32)
