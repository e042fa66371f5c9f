"""The core's verbs on torch tensors.

Eager calls on CPU tensors go straight to `mixkvq._core` with addresses and strides: no copy, no dispatcher. Under
``torch.compile``, and for tensors on CUDA devices, the same functions call the operators ``torch.ops.mixkvq.*``
(`operators`). The core's loops run in torch's intra-op pool (`mixkvq.torch_module`). No gradients flow through any of
these.

On a CUDA device they run in the device's current stream and wait for nothing, but `layer`, which reads the headers of
records. What is wrong in device memory (lengths, places, records) is not found there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import _core, operators
from .arrays import codec_numbers, core_codec, precision_code
from .config import BlockCodec
from .operators import DeviceLayer, LayerTensors
from .torch_module import needed

_CODES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_MASK_CODES = {**_CODES, torch.bool: 4}

_View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


# ---- tensors as addresses ------------------------------------------------------------------------------------------
def _refuse(name: str, value: object, allowed: str) -> ValueError:
    return ValueError(f"{name} is {value}, must be {allowed}")


def _on_cpu(tensor: Tensor, name: str) -> None:
    if not tensor.is_cpu:
        raise _refuse(name, f"on {tensor.device}", "on the CPU as the others")


def _view(tensor: Tensor, name: str, codes: dict[torch.dtype, int] = _CODES) -> _View:
    """A [.,.,.,.] tensor as the core takes it, any strides."""
    code = codes.get(tensor.dtype)
    if code is None:
        raise _refuse(name, f"of dtype {tensor.dtype}", f"one of {', '.join(map(str, codes))}")
    if not tensor.is_cpu:
        _on_cpu(tensor, name)
    return tensor.data_ptr(), code, tensor.shape, tensor.stride()


def _dense(tensor: Tensor, name: str, dtype: torch.dtype) -> _View:
    """A contiguous side array."""
    if tensor.dtype != dtype:
        raise _refuse(name, f"of dtype {tensor.dtype}", str(dtype))
    if not tensor.is_contiguous():
        raise _refuse(name, f"of strides {tensor.stride()}", "contiguous")
    if not tensor.is_cpu:
        _on_cpu(tensor, name)
    return tensor.data_ptr(), 0, tensor.shape, ()


def _written(tensor: Tensor, name: str) -> _View:
    """As `_view`, of memory that is kept or written."""
    if tensor.is_neg():
        raise _refuse(name, "a view that negates what it reads", "resolved: see torch.Tensor.resolve_neg")
    return _view(tensor, name)


def _dense_or_none(tensor: Tensor | None, name: str, dtype: torch.dtype) -> _View | None:
    return None if tensor is None else _dense(tensor, name, dtype)


# ---- packing -------------------------------------------------------------------------------------------------------
codec = core_codec
"""The checked codec of a `BlockCodec`, cached; its ``record_bound`` is the size of a staging slot."""


def pack(
    codec: BlockCodec,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    blocks: Tensor,
    max_blocks: int,
    importance: Tensor | None = None,
    mu: Tensor | None = None,
    has_mu: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pack ``blocks[b]`` blocks of row b, from token ``first[b]`` on.

    Parameters
    ----------
    codec : BlockCodec
        How; its dtype is that of k and v.
    k, v : Tensor [B, H, n, D]
        Keys and values, any strides.
    first, blocks : int64 Tensor [B]
        First token and number of blocks of each row.
    max_blocks : int
        Staging slots per head, at least every ``blocks[b]``.
    importance : float32 Tensor [B, H, D], optional
        I_d; default 1.
    mu, has_mu : float16 Tensor [B, H, D] and uint8 Tensor [B, H]
        Key references and whether they are set, updated in place; needed when the codec has a key reference.

    Returns
    -------
    staging : uint8 Tensor [B, H, max_blocks, bound]
        Records, each at the start of its slot.
    sizes : int64 Tensor [B, H, max_blocks]
        Bytes of each record, 0 where there is none.
    raised : int64 Tensor [B, H, max_blocks]
        Raised scales of each record.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    if is_compiling() or operators.wanted(k):
        needed()
        fields, thresholds = codec_numbers(codec)
        packed: tuple[Tensor, Tensor, Tensor] = torch.ops.mixkvq.pack(
            k, v, fields, thresholds, first, blocks, max_blocks, importance, mu, has_mu
        )
        return packed
    k, v = k.resolve_neg(), v.resolve_neg()
    handle = core_codec(codec)
    if max_blocks < 0:
        raise _refuse("max_blocks", max_blocks, "0 or more")
    slots, bound = (k.shape[0], k.shape[1], max_blocks), handle.record_bound
    staging = torch.empty((*slots, bound), dtype=torch.uint8, device=k.device)
    sizes, raised = (torch.zeros(slots, dtype=torch.int64, device=k.device) for _ in range(2))
    _core.pack(
        handle,
        _view(k, "k"),
        _view(v, "v"),
        _dense(first, "first", torch.int64),
        _dense(blocks, "blocks", torch.int64),
        _dense_or_none(importance, "importance", torch.float32),
        _dense_or_none(mu, "mu", torch.float16),
        _dense_or_none(has_mu, "has_mu", torch.uint8),
        (staging.data_ptr(), 0, (staging.numel(),), ()),
        bound,
        _dense(sizes, "sizes", torch.int64),
        _dense(raised, "raised", torch.int64),
    )
    return staging, sizes, raised


def salience_(sum: Tensor, q: Tensor, kv_heads: int, power: int, first: Tensor | None = None) -> None:
    """Add |q|^power of every query to ``sum``, in place.

    Parameters
    ----------
    sum : float64 Tensor [B, H, D]
        Per KV head and channel, updated.
    q : Tensor [B, Q, n, D]
        Queries, any strides.
    kv_heads : int
        H, a divisor of Q.
    power : {1, 2}
        1 for the mean absolute value, 2 for the root mean square.
    first : int64 Tensor [B], optional
        First query of each row that counts; default 0.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    if is_compiling() or operators.wanted(q):
        needed()
        torch.ops.mixkvq.salience_(sum, q, kv_heads, power, first)
        return
    starts = _dense_or_none(first, "first", torch.int64)
    q = q.resolve_neg()
    _core.salience(_view(q, "q"), kv_heads, power, starts, _dense(sum, "sum", torch.float64))


# ---- a layer -------------------------------------------------------------------------------------------------------
class Layer(_core.Layer):
    """A `_core.Layer` that keeps its tensors alive. Its methods take addresses; the functions below take tensors."""

    __slots__ = ("salience", "tensors")
    tensors: LayerTensors
    salience: tuple[int, int, _View] | None  # KV heads, power, sum


Handle = Layer | DeviceLayer
"""Of a layer on the CPU, or on a CUDA device."""


def layer(
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    start: Tensor | None,
    sink_length: int,
    slabs: Sequence[Tensor],
    place: Tensor,
    blocks: Tensor,
    mu: Tensor | None = None,
    salience: tuple[Tensor, int] | None = None,
    *,
    capacity: int = 0,
    block_tokens: int = 0,
    record_bytes: int = 0,
) -> Handle:
    """A handle for the packed history and the exact window of one layer.

    It holds addresses: change the tensors in place and it sees the change; when one is replaced, or a slab is added,
    make a new one. Their memory must stay where it is: ``share_memory_``, `multiprocessing` (which calls it for tensors
    that it sends) and ``resize_`` move it. `append` to a handle on the CPU is refused while another thread uses it.

    On a CUDA device, places and numbers of blocks that change later are seen only in the tensors of the handle,
    ``tensors.place`` (addresses, `operators.addresses`) and ``tensors.blocks``: change those in place, and a CUDA graph
    of `attend` sees the change, too. New records must be of as many tokens and not larger.

    Parameters
    ----------
    k, v : Tensor [B, H, C, D]
        Buffers of the window.
    exact : int64 Tensor [B]
        Tokens in the window of each row.
    start : int64 Tensor [B], optional
        Mask column of each row's token 0; default 0.
    sink_length : int
        Tokens of the window that stand before the packed blocks.
    slabs : sequence of uint8 Tensor [bytes]
        Storage of records.
    place : int64 Tensor [B, H, P]
        ``slab << 40 | offset`` of every record.
    blocks : int64 Tensor [B]
        Records per head. Both may be on the CPU for a layer on a CUDA device.
    mu : float16 Tensor [B, H, D], optional
        Key references.
    salience : (float64 Tensor [B, H, D], {1, 2}), optional
        Sum and power of `salience_`, for `attend` with ``observe``.
    capacity : int
        Columns of ``tensors.place`` of a layer on a CUDA device, if more than P.
    block_tokens, record_bytes : int
        Of a layer on a CUDA device: the tokens of every record, and at least the bytes of the longest, of those to
        come as well. Default: read from the records that there are.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    if operators.wanted(k):
        if bool(block_tokens) != bool(record_bytes):
            raise _refuse("record_bytes", record_bytes, f"given together with block_tokens, which is {block_tokens}")
        window, history = (k, v, exact, start, sink_length), (list(slabs), place, blocks, mu)
        return operators.layer_of(LayerTensors(*window, *history, salience, block_tokens, record_bytes), capacity)
    return core_layer(k, v, exact, start, sink_length, slabs, place, blocks, mu, salience)


def core_layer(
    k: Tensor,
    v: Tensor,
    exact: Tensor,
    start: Tensor | None,
    sink_length: int,
    slabs: Sequence[Tensor],
    place: Tensor,
    blocks: Tensor,
    mu: Tensor | None = None,
    salience: tuple[Tensor, int] | None = None,
) -> Layer:
    """As `layer`, on the CPU. Checks every record."""
    addresses = np.array([_dense(slab, "slabs", torch.uint8)[0] for slab in slabs], np.uint64)
    handle = Layer(
        _written(k, "k"),
        _written(v, "v"),
        _dense(exact, "exact", torch.int64),
        _dense_or_none(start, "start", torch.int64),
        sink_length,
        addresses,
        np.array([slab.numel() for slab in slabs], np.int64),
        _dense(place, "place", torch.int64),
        _dense(blocks, "blocks", torch.int64),
        _dense_or_none(mu, "mu", torch.float16),
    )
    handle.tensors = LayerTensors(k, v, exact, start, sink_length, list(slabs), place, blocks, mu, salience)
    handle.salience = None
    if salience is not None:
        sum, power = salience
        handle.salience = k.shape[1], power, _dense(sum, "sum", torch.float64)
    return handle


def attend(
    handle: Handle,
    q: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
    precision: str = "default",
    observe: bool = False,
) -> Tensor:
    """Attention of queries over packed blocks and window.

    Parameters
    ----------
    handle : Layer
        From `layer`.
    q : Tensor [B, Q, n, D]
        Queries, any strides; query head h reads KV head ``h // (Q / H)``.
    mask : Tensor, optional
        [B or 1, Q or 1, n or 1, columns], bool (True may attend) or float (added).
    causal : bool
        The last query stands at the last token; not together with ``mask``.
    scaling : float, optional
        Default ``D ** -0.5``.
    softcap : float
        c of ``c * tanh(score / c)``; 0: none.
    sink_logits : float32 Tensor [Q], optional
        Logits added to the softmax denominator.
    precision : {"default", "exact", "fast"}
        How codes are multiplied: "exact" in float32, within 1e-5 of float64 attention on the unpacked values; with
        queries and probabilities in 16 bits, or, "fast", queries in 8 bits on 2-bit keys: errors that grow with the
        logits, below 2e-3 (6e-2) where their standard deviation is at most 16 (2).
    observe : bool
        Do with these queries what `salience_` does, if the layer was given a sum.

    Returns
    -------
    Tensor [B, n, Q, D]
        Contiguous, of q's dtype: the layout that transformers' attention functions return.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed.
    """
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if is_compiling() or type(handle) is not Layer:
        return operators.attend(handle, q, mask, causal, scale, softcap, sink_logits, precision, observe)
    if q.is_neg():
        q = q.resolve_neg()
    view = _view(q, "q")
    shape = view[2]
    if len(shape) != 4:
        raise _refuse("q", f"{len(shape)}-dimensional", "[B, Q, n, D]")
    batch, heads, n, dim = shape
    out = torch.empty(batch, n, heads, dim, dtype=q.dtype, device=q.device)
    handle.attend(
        view,
        (out.data_ptr(), view[1], shape, (n * heads * dim, dim, heads * dim, 1)),
        None if mask is None else _view(mask, "mask", _MASK_CODES),
        causal,
        scale,
        softcap,
        _dense_or_none(sink_logits, "sink_logits", torch.float32),
        precision_code(precision),
    )
    if observe and handle.salience is not None:
        kv_heads, power, sum = handle.salience
        _core.salience(view, kv_heads, power, None, sum)
    return out


def append(handle: Handle, k_new: Tensor, v_new: Tensor) -> None:
    """Copy new tokens [B, H, n, D] behind the window and add n to ``exact``, in place.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed; nothing has been written then.
    """
    if is_compiling() or type(handle) is not Layer:
        operators.append(handle, k_new, v_new)
        return
    if k_new.is_neg() or v_new.is_neg():
        k_new, v_new = k_new.resolve_neg(), v_new.resolve_neg()
    handle.append(_view(k_new, "k_new"), _view(v_new, "v_new"))


def unpack(handle: Handle, k: Tensor, v: Tensor, first: Tensor) -> None:
    """Decode the packed blocks of row b into ``k``, ``v`` [B, H, n, D] from token ``first[b]`` (int64 Tensor [B]) on.

    Raises
    ------
    ValueError
        Naming the argument, its value and what is allowed; nothing has been written then.
    """
    if is_compiling() or type(handle) is not Layer:
        operators.unpack(handle, k, v, first)
        return
    handle.unpack(_written(k, "k"), _written(v, "v"), _dense(first, "first", torch.int64))
