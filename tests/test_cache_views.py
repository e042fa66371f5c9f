"""Keys, values and queries in any layout in memory: the cache is, bit for bit, that of contiguous copies."""

from __future__ import annotations

import numpy as np
import torch
from core_cases import examples
from hypothesis import given
from hypothesis import strategies as st
from one_layer import DIM, HEADS, QUERY_HEADS, Module, attention, found
from test_cache_model import BLOCK, CODINGS

from mixkvq import MixKVQCache


def any_view(rng: np.random.Generator, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A view of numbers like ``x``, axes in any order with gaps, some of them of stride 0; and what it is a view of."""
    order, step, begin = rng.permutation(4).tolist(), rng.integers(1, 3, 4).tolist(), rng.integers(0, 3, 4).tolist()
    shape = [1 if rng.random() < 0.15 else n for n in x.shape]
    wide = torch.full([begin[axis] + step[axis] * shape[axis] for axis in order], 7, dtype=x.dtype)
    view = wide.permute(np.argsort(order).tolist())
    view = view[tuple(slice(b, b + s * n, s) for b, s, n in zip(begin, step, shape, strict=True))]
    view.copy_(x[tuple(slice(n) for n in shape)])
    return view.expand(x.shape), wide


@examples(15)
@given(
    seed=st.integers(0, 2**32 - 1),
    coding=st.sampled_from(list(CODINGS)),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    batch=st.integers(1, 3),
    tokens=st.lists(st.sampled_from([1, 1, 1, 2, 5, 31, 40, 80]), min_size=2, max_size=10),
)
def test_any_view_is_its_contiguous_copy(seed, coding, dtype, batch, tokens):
    """Also after the views were written over, which is their owner's right once attention has run."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    name, fields = CODINGS[coding]
    caches = [MixKVQCache(name, **BLOCK | fields) for _ in range(2)]
    length = 0
    for n in [70, *tokens]:
        length += n
        mask = torch.ones(n, length, dtype=torch.bool).tril(length - n)[None, None]
        random = (torch.randn(batch, heads, n, DIM, generator=generator) for heads in (QUERY_HEADS, HEADS, HEADS))
        views, wholes = zip(*(any_view(rng, x.to(dtype)) for x in random), strict=True)
        copies = [view.clone(memory_format=torch.contiguous_format) for view in views]
        outputs = []
        for cache, (q, k, v) in zip(caches, (views, copies), strict=True):
            with torch.no_grad():
                given_ = cache.update(k, v, 0)
                outputs.append(found(attention)(Module(), q, *given_, mask, scaling=DIM**-0.5, dropout=0.0)[0])
        if length > 70:  # until then torch multiplies, in another order for other strides
            assert torch.equal(*outputs)
        for whole in wholes:
            whole.fill_(5)
    (mine,), (theirs,) = (cache.layers for cache in caches)
    assert mine.path == "packed" and len(mine.tensors()) == len(theirs.tensors())
    assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
    assert caches[0].report() == caches[1].report()
