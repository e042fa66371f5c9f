"""Layers on CUDA devices: handles for the operators `torch.ops.mixkvq`, which compiled graphs call too.

On the CPU eager calls go to `mixkvq._core` (`ops`), whose handles keep addresses and check records once. CUDA kernels
get everything from tensors: places are addresses of records in a table that may have room for more, and all lengths are
read on the device, so that a call can be captured in a CUDA graph and replayed while its layer grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import torch_module
from .arrays import precision_code
from .placement import Workspaces
from .torch_module import PROBLEM, needed

rehearsing = False
"""For tests: CPU tensors, too, go the way that CUDA tensors go."""

_OFFSET = (1 << 40) - 1
_TOKENS, _NBYTES = 10, 20  # where a record has its tokens (16 bits) and length (32 bits), docs/format.md section 1

_attend: Any = None
_append: Any = None
_unpack: Any = None
_salience: Any = None
_workspace: Any = None
if PROBLEM is None:
    _attend, _append = torch.ops.mixkvq.attend.default, torch.ops.mixkvq.append_.default
    _unpack, _salience = torch.ops.mixkvq.unpack.default, torch.ops.mixkvq.salience_.default
    _workspace = torch.ops.mixkvq.attend_workspace.default


def wanted(tensor: Tensor) -> bool:
    """Whether an eager call on this tensor goes to an operator.

    Raises
    ------
    ValueError
        If there are no kernels for its device.
    """
    if tensor.is_cpu:
        return rehearsing
    problem, remedy = torch_module.CUDA_PROBLEM, torch_module.CUDA_REMEDY
    if tensor.is_cuda and problem is None:
        return True
    if tensor.is_cuda:
        raise ValueError(f"no kernels for tensors on {tensor.device}: {problem}; {remedy}")
    raise ValueError(f"no kernels for tensors on {tensor.device}, must be on the CPU or on a CUDA device")


def waits(tensor: Tensor) -> bool:
    """Whether reading a tensor would wait for a device."""
    return rehearsing or not tensor.is_cpu


class LayerTensors(NamedTuple):
    """What a layer consists of; see `ops.layer`.

    Attributes
    ----------
    block_tokens, record_bytes : int
        0, 0: ``place`` has slabs and offsets. Else it has addresses of records of so many tokens and at most so many
        bytes, and ``slabs`` are only kept alive.
    """

    k: Tensor
    v: Tensor
    exact: Tensor
    start: Tensor | None
    sink_length: int
    slabs: list[Tensor]
    place: Tensor
    blocks: Tensor
    mu: Tensor | None
    salience: tuple[Tensor, int] | None
    block_tokens: int = 0
    record_bytes: int = 0

    def history(self) -> tuple[list[Tensor], Tensor, Tensor, Tensor | None]:
        return [] if self.record_bytes else self.slabs, self.place, self.blocks, self.mu


class DeviceLayer:
    """A handle like `ops.Layer` for the operators.

    Lengths are on the device; whoever changes tensors in place, in the order of the stream, need not make another.

    Parameters
    ----------
    tensors : LayerTensors
        With addresses, if there is any record.
    workspaces : Workspaces, optional
        Shared with layers that never run at the same time; default: its own.
    """

    __slots__ = ("_calls", "_captured", "_workspace", "tensors", "workspaces")

    def __init__(self, tensors: LayerTensors, workspaces: Workspaces | None = None) -> None:
        self.tensors, self.workspaces = tensors, workspaces or Workspaces()
        self._workspace: Tensor | None = None
        self._captured: dict[int, Tensor] = {}  # what graphs write to as long as they live
        self._calls: Any = None  # what those calls have in common that the workspace is for

    def workspace(self, q: Tensor, precision: int) -> Tensor | None:
        """For a call with such queries, the same as long as their shape is; None: the call shall make its own."""
        calls = q.shape, precision
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            if self._workspace is None or calls != self._calls:
                return None  # zeros would be written by the graph, later
            self._captured[id(self._workspace)] = self._workspace
        elif self._workspace is None or calls != self._calls:
            t = self.tensors
            nbytes = _workspace(q, t.place, t.blocks, t.k, precision, t.block_tokens, t.record_bytes)
            self._workspace = self.workspaces.take((*calls, t.k.shape[1]), nbytes, q.device)
            self._calls = calls
        return self._workspace


# ---- making handles ------------------------------------------------------------------------------------------------
def addresses(slabs: Sequence[Tensor], place: Tensor, capacity: int = 0) -> Tensor:
    """The addresses of records, int64 [B, H, capacity] on the device of ``place``, 0 where there is none.

    Parameters
    ----------
    slabs : sequence of uint8 Tensor [bytes]
    place : int64 Tensor [B, H, P]
        ``slab << 40 | offset``, negative where there is no record.
    capacity : int
        Room for so many records of a head, at least P.
    """
    base = torch.tensor([slab.data_ptr() for slab in slabs] or [0], dtype=torch.int64, device=place.device)
    found = torch.where(place >= 0, base[place.clamp(min=0) >> 40] + (place & _OFFSET), 0)
    return torch.nn.functional.pad(found, (0, max(0, capacity - place.shape[2])))


def layer_of(tensors: LayerTensors, capacity: int = 0) -> DeviceLayer:
    """A handle for a layer whose places are slabs and offsets; see `ops.layer`.

    Without ``record_bytes`` the headers of records are read, which waits for the device.
    """
    device = tensors.k.device
    t = tensors._replace(place=tensors.place.to(device), blocks=tensors.blocks.to(device))
    column = torch.arange(t.place.shape[2], device=device)
    place = torch.where(column < t.blocks.view(-1, 1, 1), t.place, -1)
    if not t.record_bytes:
        found = _sizes(t.slabs, place)
        if found is None and capacity:
            raise ValueError(
                f"capacity is {capacity}, must be 0 for a layer without records, or block_tokens and record_bytes be "
                "those of the records to come"
            )
        if found is None:
            return DeviceLayer(t._replace(slabs=[], place=t.place[:, :, :0].contiguous()))
        t = t._replace(block_tokens=found[0], record_bytes=found[1])
    return DeviceLayer(t._replace(place=addresses(t.slabs, place, capacity)))


def _sizes(slabs: Sequence[Tensor], place: Tensor) -> tuple[int, int] | None:
    """Tokens of all records and bytes of the longest; None if there are none."""
    heads = torch.cat([torch.empty(0, 32, dtype=torch.uint8, device="cpu"), *_headers(slabs, place)])
    if not len(heads):
        return None
    tokens = heads[:, _TOKENS : _TOKENS + 2].contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    if int(tokens.min()) != int(tokens.max()):
        raise ValueError(f"records are of {int(tokens.min())} to {int(tokens.max())} tokens, must all be of one length")
    return int(tokens[0]), int(heads[:, _NBYTES : _NBYTES + 4].contiguous().view(torch.int32).max())


def _headers(slabs: Sequence[Tensor], place: Tensor) -> list[Tensor]:
    """The first 32 bytes of all records, on the CPU."""
    places = place[place >= 0].cpu()
    found = []
    for index, slab in enumerate(slabs):
        at = (places[places >> 40 == index] & _OFFSET).to(slab.device)
        found.append(slab[at.view(-1, 1) + torch.arange(32, device=slab.device)].cpu())
    return found


# ---- calls ---------------------------------------------------------------------------------------------------------
def attend(
    handle: Any,
    q: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float,
    sink_logits: Tensor | None,
    precision: str,
    observe: bool,
) -> Tensor:
    """As `ops.attend`, for either kind of handle."""
    needed()
    t, code = handle.tensors, precision_code(precision)
    result: Tensor = _attend(
        q,
        *t.history(),
        t.k,
        t.v,
        t.exact,
        t.start,
        t.sink_length,
        mask,
        causal,
        scaling,
        softcap,
        sink_logits,
        code,
        t.block_tokens,
        t.record_bytes,
        None if is_compiling() or type(handle) is not DeviceLayer else handle.workspace(q, code),
    )
    if observe and t.salience is not None:
        _salience(t.salience[0], q, t.k.shape[1], t.salience[1], None)
    return result


def append(handle: Any, k_new: Tensor, v_new: Tensor) -> None:
    """As `ops.append`."""
    needed()
    t = handle.tensors
    _append(t.k, t.v, t.exact, k_new, v_new)


def unpack(handle: Any, k: Tensor, v: Tensor, first: Tensor) -> None:
    """As `ops.unpack`."""
    needed()
    t = handle.tensors
    _unpack(*t.history(), k, v, first, t.block_tokens, t.record_bytes)
