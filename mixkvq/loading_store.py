"""The packed part of a layer from a file: everything that the kernels trust is checked here, or by the core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .config import BlockCodec, MixKVQConfig
from .queries import QueryStatistics
from .slabs import ALIGNMENT, RecordTable
from .states import codec_of
from .store import PackedStore
from .strict_json import MAX_COUNT

_DTYPE_CODES = {"float32": 1, "float16": 2, "bfloat16": 3}  # docs/format.md section 1
_METADATA = {"e5m3": 0, "fp16": 1}
_HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "u1"),
        ("kind", "u1"),
        ("dtype", "u1"),
        ("value_bits", "u1"),
        ("head_dim", "<u2"),
        ("tokens", "<u2"),
        ("key_group", "<u2"),
        ("value_group", "<u2"),
        ("metadata", "u1"),
        ("flags", "u1"),
        ("value_fold", "<u2"),
        ("nbytes", "<u4"),
        ("key_fold", "<u2", 4),
    ]
)
Tensors = Mapping[str, torch.Tensor]


def _tensor(given: Tensors, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor that must be there, of this dtype and shape."""
    tensor = given[name]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, must be {dtype} {list(shape)}")
    return tensor


def restored_queries(config: MixKVQConfig, given: Tensors, whole: Any) -> QueryStatistics:
    """The statistics of queries.

    Raises
    ------
    ValueError
        If they do not fit to the keys.
    """
    if type(whole) is not int or not 0 <= whole < MAX_COUNT:
        raise ValueError(f"query_count is {whole!r:.80}")
    sum, count = given.get("query_sum"), given.get("query_count")
    if sum is None and count is None:
        return QueryStatistics.restored(config.salience, None, None, whole)
    keys = given["k"]
    if config.salience == "none" or keys.dim() != 4:
        raise ValueError("query_sum is there, and nothing that it is for")
    sum = _tensor(given, "query_sum", torch.float64, (*keys.shape[:2], keys.shape[3]))
    count = _tensor(given, "query_count", torch.int64, tuple(keys.shape[:1]))
    if bool(((count < 0) | (count >= MAX_COUNT)).any()):
        raise ValueError("query_count is below 0 or too large")
    return QueryStatistics.restored(config.salience, sum, count, whole)


def restored_store(
    config: MixKVQConfig, given: Tensors, queries: QueryStatistics, length: int, raised: int
) -> PackedStore:
    """The store of a packed layer.

    Parameters
    ----------
    config : MixKVQConfig
    given : mapping
        Tensors k, v [B, H, tokens in use, D], exact, start, blocks [B], place [B, H, blocks], records [bytes], and mu
        and has_mu where keys are coded against a reference.
    queries : QueryStatistics
    length : int
        Columns seen.
    raised : int
        Raised scales.

    Raises
    ------
    ValueError, KeyError
        If the parts do not belong together, or a record is damaged.
    """
    k = given["k"]
    if k.dim() != 4 or min(k.shape[1], k.shape[3]) < 1:
        raise ValueError(f"keys {list(k.shape)}")
    batch, heads, used, dim = k.shape
    v = _tensor(given, "v", k.dtype, tuple(k.shape))
    codec = codec_of(config, k, v)
    if config.salience != "none" and queries.sum is None:
        raise ValueError("query_sum is missing")
    rows = {name: _tensor(given, name, torch.int64, (batch,)) for name in ("exact", "start", "blocks")}
    exact, start, blocks = rows.values()
    most = max(blocks.tolist(), default=0)
    place = _tensor(given, "place", torch.int64, (batch, heads, max(most, 0)))
    for at, n, packed in zip(start.tolist(), exact.tolist(), blocks.tolist(), strict=True):
        if min(at, n, packed) < 0 or at + n + packed * config.block_length != length:
            raise ValueError(f"a row of {length} columns from {at} has {n} exact tokens and {packed} blocks")
        if packed and n < config.sink_length:
            raise ValueError(f"a row has {packed} blocks behind {n} of {config.sink_length} sinks")
    if used != max(exact.tolist(), default=0):
        raise ValueError(f"keys have room for {used} tokens, of which {exact.tolist()!r:.80} are in use")
    column = torch.arange(max(most, 0), device=place.device)
    if not torch.equal(place >= 0, (column < blocks.view(-1, 1, 1)).expand_as(place)):
        raise ValueError("place does not have one record for every block")
    slab = given["records"]
    if slab.dtype != torch.uint8 or slab.dim() != 1:
        raise ValueError(f"records are {slab.dtype} {list(slab.shape)}")
    offsets, index = np.unique(place[place >= 0].numpy(), return_inverse=True)
    headers = _headers(slab.numpy(), offsets)
    _check_headers(headers, codec)
    coded = torch.zeros(place.shape, dtype=torch.bool, device=place.device)
    coded[place >= 0] = torch.from_numpy(headers["kind"][index.reshape(-1)] == 0)
    widths = {int(n) for n in headers["nbytes"]}
    table = RecordTable.restored(slab, place, blocks, widths)
    reference = _reference(given, codec, (batch, heads, dim), coded)
    return PackedStore.restored(config, codec, (k, v, exact), start, table, reference, queries, length, raised)


def _headers(slab: Any, offsets: Any) -> Any:
    """The headers of records at ``offsets`` (ascending), which fill the slab without gaps."""
    if (offsets % ALIGNMENT).any() or (offsets > len(slab) - ALIGNMENT).any():
        raise ValueError(f"place has offsets outside of {len(slab)} bytes of records, or between them")
    headers = slab[offsets[:, None] + np.arange(_HEADER.itemsize)].view(_HEADER)[:, 0]
    ends = offsets + headers["nbytes"]
    if [0, *ends.tolist()] != [*offsets.tolist(), len(slab)]:
        raise ValueError(f"place and the lengths of records do not fill {len(slab)} bytes")
    return headers


def _check_headers(headers: Any, codec: BlockCodec) -> None:
    """Refuse records that this codec does not make. What else can be wrong with one, the core sees."""
    expected = {
        "dtype": _DTYPE_CODES[codec.dtype],
        "head_dim": codec.head_dim,
        "tokens": codec.block_length,
    }
    of_coded = {
        "value_bits": codec.value_bits,
        "key_group": codec.key_group,
        "value_group": codec.value_group if codec.value_bits else 0,
        "metadata": _METADATA[codec.key_metadata] | (_METADATA[codec.value_metadata] << 4 if codec.value_bits else 0),
        "flags": int(codec.key_reference) | (2 * codec.value_rotation if codec.value_bits else 0),
    }
    coded = headers["kind"] == 0
    if codec.allocate == "exact" and coded.any():
        raise ValueError("a coded record where all must be exact")
    for which, fields in ((slice(None), expected), (coded, of_coded)):
        for name, value in fields.items():
            if (headers[which][name] != value).any():
                raise ValueError(f"a record whose {name} is not {value}")


def _reference(
    given: Tensors, codec: BlockCodec, shape: tuple[int, int, int], coded: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """mu and has_mu, which a head has as long as it has a record that is coded, bool [B, H, blocks]."""
    if not codec.key_reference or codec.allocate == "exact":
        if "mu" in given or "has_mu" in given:
            raise ValueError("mu is there, and no key is coded against it")
        return None
    mu = _tensor(given, "mu", torch.float16, shape)
    has_mu = _tensor(given, "has_mu", torch.uint8, shape[:2])
    if not torch.equal(has_mu, coded.any(2).to(torch.uint8)) or not bool(mu.isfinite().all()):
        raise ValueError("mu is not that of the heads with coded records")
    return mu, has_mu
