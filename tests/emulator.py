"""The CUDA kernels' own source on the host (csrc/cuda/emulate.h), called as `mixkvq.arrays` calls the CPU core.

MIXKVQ_EMULATOR chooses the build: plain (default), thread or address (emulator_build.py); "device": no emulator but
`mixkvq._cuda` on a real GPU (on_device.py); "copies": a rehearsal of that. MKVQ_EMULATE_SEED chooses the order in which
the threads of a block run. Arrays that kernels get are as long as they say, so that AddressSanitizer sees where they
end. A test file that uses this begins with ``pytestmark = emulator.NEEDED``.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import emulator_build
import numpy as np
import on_device
import pytest
from emulator_structs import Append, Attend, Codec, Error, History, Pack, Salience, Unpack, View, check

from mixkvq import arrays
from mixkvq.config import BlockCodec

VARIANT = os.environ.get("MIXKVQ_EMULATOR") or "plain"
_MISSING = on_device.missing() if VARIANT == "device" else emulator_build.missing()
NEEDED = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

_DTYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2, np.dtype(np.uint16): 3, np.dtype(np.bool_): 4}


# ---- the library ---------------------------------------------------------------------------------------------------
@cache
def library() -> Any:
    """Built if need be."""
    if VARIANT == "device":
        return on_device.library()
    found = ctypes.CDLL(str(emulator_build.build("plain" if VARIANT == "copies" else VARIANT)))
    check(found)
    found.mkvq_status_text.restype = ctypes.c_char_p
    return on_device.rehearsal(found) if VARIANT == "copies" else found


def call(name: str, args: Any) -> None:
    """ValueError for what the function refuses, AttributeError for one that is not there."""
    function, error = getattr(library(), f"mkvq_cuda_{name}"), Error()
    status = function(ctypes.byref(args), None, ctypes.byref(error))
    if status:
        text = library().mkvq_status_text(status).decode()
        where = (
            f"{error.argument.decode()} is {error.value}, must be {error.allowed.decode()} " if error.argument else ""
        )
        raise ValueError(f"{where}({text})")


def workspace_bytes(args: Attend) -> int:
    function = library().mkvq_cuda_attend_workspace
    function.restype = ctypes.c_int64
    return int(function(ctypes.byref(args)))


# ---- memory --------------------------------------------------------------------------------------------------------
@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def aligned(nbytes: int, fill: int = 0) -> np.ndarray:
    """uint8 [nbytes] on a 64-byte boundary, with nothing behind it."""
    found = ctypes.c_void_p()
    if _libc().posix_memalign(ctypes.byref(found), 64, max(nbytes, 1)):
        raise MemoryError(nbytes)
    memory = (ctypes.c_uint8 * max(nbytes, 1)).from_address(found.value or 0)
    weakref.finalize(memory, _libc().free, found.value)
    array = np.frombuffer(memory, np.uint8)[:nbytes]
    array[...] = fill
    return array


def view(x: np.ndarray) -> View:
    """Of an array of 4 dimensions; uint16 holds bfloat16."""
    if x.ndim != 4 or x.dtype not in _DTYPES or any(step % x.itemsize for step in x.strides):
        raise ValueError(f"array of {x.ndim} dimensions, {x.dtype}, with strides {x.strides}: must be a view of 4")
    steps = [step // x.itemsize if size > 1 else 0 for size, step in zip(x.shape, x.strides, strict=True)]
    return View(x.ctypes.data, x.shape, tuple(steps), _DTYPES[x.dtype])


def address(x: np.ndarray | None) -> int | None:
    """Of a dense array; None for none."""
    if x is None:
        return None
    if not x.flags.c_contiguous:
        raise ValueError(f"array of strides {x.strides}, must be C-contiguous")
    return x.ctypes.data


def integers(values: Any) -> np.ndarray:
    return np.ascontiguousarray(values, np.int64)


def codec_struct(codec: BlockCodec) -> Codec:
    fields, thresholds = arrays.codec_numbers(codec)
    patterns = [fields[i : i + 6] for i in range(15, len(fields), 6)]
    struct = Codec(*fields[:15], len(patterns), *thresholds)
    for mine, given in zip(struct.patterns, patterns, strict=False):
        mine[:] = given
    return struct


# ---- records -------------------------------------------------------------------------------------------------------
class Packed:
    """Records in memory of their own, and the struct that tells a kernel where.

    Attributes
    ----------
    history : History
    blocks : int64 [B]
        As ``history`` has them, to be changed between calls.
    place : int64 [B, H, capacity]
        Addresses; -1 where there is no record.
    """

    def __init__(
        self,
        records: arrays.Records,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        mu: Any = None,
        capacity: int | None = None,
    ) -> None:
        batch, heads = len(records), len(records[0]) if records else kv_heads or 1
        self.blocks = integers([len(row[0]) for row in records])
        most = max(int(self.blocks.max(initial=0)), capacity or 0)
        self.place = np.full((batch, heads, most), -1, np.int64)
        self.memory, lengths, self.mu = [], set(), None if mu is None else np.ascontiguousarray(mu)
        longest = 64
        for b, row in enumerate(records):
            for h, head in enumerate(row):
                for j, record in enumerate(head):
                    memory = aligned(len(record))
                    memory[:] = np.frombuffer(record, np.uint8)
                    self.memory.append(memory)
                    self.place[b, h, j] = memory.ctypes.data
                    longest = max(longest, len(record))
                    lengths.add(arrays.inspect(record)["tokens"])
        if len(lengths) > 1:
            raise ValueError(f"records are of {sorted(lengths)} tokens, must all be of one length")
        self.history = History(
            place=address(self.place),
            place_stride=most,
            blocks=address(self.blocks),
            mu=address(self.mu),
            batch=batch,
            kv_heads=heads,
            head_dim=head_dim,
            checked=1,
            block_tokens=lengths.pop() if lengths else 32,
            record_bytes=longest,
        )


def pack(
    codec: BlockCodec,
    k: np.ndarray,
    v: np.ndarray,
    *,
    first: Any = None,
    blocks: Any = None,
    importance: np.ndarray | None = None,
    mu: np.ndarray | None = None,
    has_mu: np.ndarray | None = None,
) -> arrays.Packed:
    """As `arrays.pack`."""
    bound = arrays.core_codec(codec).record_bound
    batch, heads, tokens, head_dim = k.shape
    starts = np.zeros(batch, np.int64) if first is None else integers(first)
    counts = np.maximum(tokens - starts, 0) // codec.block_length if blocks is None else integers(blocks)
    most = max(int(counts.max(initial=0)), 0)
    out = aligned(batch * heads * most * bound, 0xEE)
    sizes, raised = np.full((2, batch, heads, most), -7, np.int64)
    if codec.key_reference:
        mu = np.zeros((batch, heads, head_dim), np.float16) if mu is None else np.array(mu).view(np.float16)
        has_mu = np.zeros((batch, heads), np.uint8) if has_mu is None else np.array(has_mu, np.uint8)
    else:
        mu = has_mu = None
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    struct = codec_struct(codec)
    args = Pack(
        codec=ctypes.pointer(struct),
        k=view(k),
        v=view(v),
        first=address(starts),
        blocks=address(counts),
        max_blocks=most,
        importance=address(weights),
        mu=address(mu),
        has_mu=address(has_mu),
        out=address(out),
        out_stride=bound,
        sizes=address(sizes),
        raised=address(raised),
    )
    call("pack", args)
    slots = out.reshape(batch, heads, most, bound)
    records = [
        [[slots[b, h, j, : sizes[b, h, j]].tobytes() for j in range(counts[b])] for h in range(heads)]
        for b in range(batch)
    ]
    for b in range(batch):
        assert (sizes[b, :, counts[b] :] == 0).all(), "a block that was not packed must have size 0"
    return arrays.Packed(records, raised, mu, has_mu)


def unpack_into(packed: Packed, k: np.ndarray, v: np.ndarray, first: Any) -> None:
    """Write all tokens of the records to k, v [B, H, n, D], row b from token ``first[b]`` on."""
    starts = integers(first)
    call("unpack", Unpack(history=ctypes.pointer(packed.history), k=view(k), v=view(v), first=address(starts)))


def unpack(record: bytes, *, mu: Any = None, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """As `arrays.unpack`."""
    info = arrays.inspect(record)
    k, v = (np.empty((1, 1, info["tokens"], info["head_dim"]), arrays._numpy_dtype(dtype)) for _ in range(2))
    reference = None if mu is None else np.ascontiguousarray(mu)[None, None]
    unpack_into(Packed([[[record]]], info["head_dim"], mu=reference), k, v, [0])
    return k[0, 0], v[0, 0]


# ---- tokens and queries --------------------------------------------------------------------------------------------
def append(k: np.ndarray, v: np.ndarray, exact: np.ndarray, k_new: np.ndarray, v_new: np.ndarray) -> None:
    """Copies k_new, v_new [B, H, n, D] behind the ``exact[b]`` tokens of k, v [B, H, C, D], and adds n to ``exact``."""
    call("append", Append(k=view(k), v=view(v), k_new=view(k_new), v_new=view(v_new), exact=address(exact)))


def salience(
    q: np.ndarray, kv_heads: int, *, power: int, first: Any = None, sum: np.ndarray | None = None
) -> np.ndarray:
    """As `arrays.salience`."""
    total = np.zeros((q.shape[0], kv_heads, q.shape[3])) if sum is None else np.array(sum, np.float64)
    starts = None if first is None else integers(first)
    args = Salience(q=view(q), kv_heads=kv_heads, power=power, first=address(starts), sum=address(total))
    call("salience", args)
    return total


def attend(
    q: np.ndarray,
    records: arrays.Records | Packed,
    k: np.ndarray,
    v: np.ndarray,
    exact: Any,
    *,
    dtype: str | None = None,
    mu: Any = None,
    start: Any = None,
    sink_length: int = 0,
    mask: str | np.ndarray | None = None,
    scaling: float | None = None,
    softcap: float = 0.0,
    sink_logits: Sequence[float] | np.ndarray | None = None,
    precision: str = "default",
    out: np.ndarray | None = None,
    workspace: np.ndarray | bool = True,
) -> np.ndarray:
    """As `arrays.attend`. Also takes records that lie there already, where to write, and a workspace (False: none)."""
    q, k, v = (arrays._typed(x, dtype) for x in (q, k, v))
    allowed = None if mask is None or isinstance(mask, str) else arrays._typed(arrays._mask(mask, q.shape), dtype)
    packed = records if isinstance(records, Packed) else Packed(records, q.shape[3], kv_heads=k.shape[1], mu=mu)
    sinks = None if sink_logits is None else np.ascontiguousarray(sink_logits, np.float32)
    counts, starts = integers(exact), None if start is None else integers(start)
    out = np.full(q.shape, np.nan, np.float32) if out is None else out
    args = Attend(
        q=view(q),
        out=view(out),
        history=ctypes.pointer(packed.history),
        k=view(k),
        v=view(v),
        exact=address(counts),
        start=address(starts),
        sink_length=sink_length,
        mask_kind=0 if mask is None else 1 if isinstance(mask, str) else 2,
        mask=View() if allowed is None else view(allowed),
        scaling=q.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sink_logits=address(sinks),
        precision=arrays.precision_code(precision),
    )
    if workspace is True:
        workspace = aligned(workspace_bytes(args))
    if isinstance(workspace, np.ndarray):
        args.workspace, args.workspace_bytes = address(workspace), workspace.nbytes
    call("attend", args)
    return out
