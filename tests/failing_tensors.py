"""Changes of a cache in which every allocation of a tensor fails in its turn; for `test_faults_memory.py`."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from failing import ALIGNED, every
from models import forward, lossless, paths, prompts, tiny
from one_layer import HEADS, Layer

from mixkvq import MixKVQCache
from mixkvq.guard import lacks_memory

BLOCK = {"block_length": 32, "residual_length": 32, "key_group_size": 32}


def filled(tokens: int, **preset: Any) -> Layer:
    """A layer without a model around it, on a cache with so many tokens, padded in one row."""
    layer = Layer(MixKVQCache(**BLOCK, **preset), batch=2)
    if tokens:
        for n in (tokens - 1, 1):
            columns = torch.arange(layer.keys.shape[2] + n)
            mask = (columns <= columns[-n:].view(-1, 1)).expand(2, 1, -1, -1).clone()
            mask[1, ..., :9] = False
            layer.step(n, mask)
    return layer


def held(cache: MixKVQCache) -> list[Any]:
    """All that a cache holds, its workings left aside."""
    layer: Any = cache.layers[0]
    if layer.store is None:
        return [layer.length, *(None if t is None else t.tolist() for t in (layer._k, layer._v, layer.start))]
    store = layer.store
    exact = [[b[row, :, :n].tolist() for b in (store.k, store.v)] for row, n in enumerate(store.exact.tolist())]
    blocks = store.blocks.tolist()
    records = [[store.record(row, h, i) for h in range(HEADS) for i in range(n)] for row, n in enumerate(blocks)]
    sums = [None if t is None else t.tolist() for t in (store.queries.sum, store.queries.count)]
    return [layer.length, store.length, store.raised, store.start.tolist(), exact, blocks, records, sums, store.torn]


def new(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = torch.randn(2, 2, HEADS, n, 16, generator=torch.Generator().manual_seed(n))
    return k, v


def saved(cache: MixKVQCache) -> None:
    with tempfile.NamedTemporaryFile() as file:
        cache.save(file.name)


CHANGES: dict[str, tuple[int, dict[str, Any], Callable[[MixKVQCache], Any]]] = {
    "first update": (0, {}, lambda cache: cache.update(*new(5), 0)),
    "update of a plain layer": (20, {}, lambda cache: cache.update(*new(5), 0)),
    "update of a packed layer": (80, {}, lambda cache: cache.update(*new(1), 0)),
    "update of many tokens": (80, {}, lambda cache: cache.update(*new(300), 0)),
    "pack": (80, {}, lambda cache: flush(cache)),
    "crop of the window": (80, {}, lambda cache: cache.crop(-1)),
    "crop into a block": (150, {}, lambda cache: cache.crop(-70)),
    "crop of a plain layer": (20, {}, lambda cache: cache.crop(-3)),
    "reorder": (150, {}, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
    "reorder of a plain layer": (20, {}, lambda cache: cache.reorder_cache(torch.tensor([1, 0]))),
    "select": (150, {}, lambda cache: cache.batch_select_indices(torch.tensor([1]))),
    "repeat": (150, {}, lambda cache: cache.batch_repeat_interleave(2)),
    "fork": (150, {}, lambda cache: cache.fork(2)),
    "save": (150, {}, saved),
    "read": (150, {}, lambda cache: cache.layers[0].keys),
    "lossless": (150, {"preset": "lossless"}, lambda cache: cache.crop(-70)),
    "report": (150, {}, lambda cache: cache.report()),
}


def flush(cache: MixKVQCache) -> None:
    """Pack what 300 more tokens make due."""
    store: Any = cache.layers[0].store
    if store.length < 300:
        store.append(*new(300))
        cache.layers[0].length = store.length
    store.flush()


def changes(*names: str) -> None:
    """Print these changes (or all) and how many allocations there were to fail."""
    for name in names or CHANGES:
        tokens, fields, change = CHANGES[name]
        base = filled(tokens, **fields).cache
        want = copy.deepcopy(base)
        change(want)
        state: list[Any] = [copy.deepcopy(base), held(base) if tokens else None]

        def attempt(state: list[Any] = state, change: Any = change) -> None:
            change(state[0])

        failures = 0
        for error, _ in every(attempt, ALIGNED):
            cache, before = state
            failures += 1
            assert error is None or lacks_memory(error), (name, error)
            if error is not None:
                if tokens and name != "pack":
                    assert held(cache) == before, (name, failures, error)
                change(cache)
            assert held(cache) == held(want), (name, failures, error)
            state[0] = copy.deepcopy(base)
        print(name, failures)


def passes() -> None:
    """Print every forward pass of a model and how many allocations there were without which it breaks off."""
    model, ids = tiny("llama"), prompts([120])["input_ids"]
    for name, sizes in {"prompt": (100,), "step": (100, 1), "step that packs": (95, 1), "chunk": (60, 40)}.items():
        *done, n = sizes
        base, at = lossless(), 0
        for size in done:
            forward(model, base, ids[:, at : at + size])
            at += size
        want = copy.deepcopy(base)
        logits = [forward(model, want, part) for part in (ids[:, at : at + n], ids[:, at + n : at + n + 15])]
        state, refused = [copy.deepcopy(base)], 0

        def attempt(state: Any = state, begin: int = at, end: int = at + n) -> Any:
            return forward(model, state[0], ids[:, begin:end])

        for failures, (error, _) in enumerate(every(attempt, ALIGNED, most=20_000)):
            cache = state[0]
            if error is not None:
                refused += 1
                assert lacks_memory(error), (name, failures, error)
                more = cache.get_seq_length() - at
                if more:
                    cache.crop(-more)
                assert {layer.length for layer in cache.layers if layer.length or at} in (set(), {at})
                assert torch.equal(attempt(), logits[0]), (name, failures, error)
            again = forward(model, cache, ids[:, at + n : at + n + 15])
            assert torch.allclose(again, logits[1], atol=1e-5), (name, failures, error)
            assert set(paths(cache)) == {"packed"}, (name, failures, paths(cache))
            state[0] = copy.deepcopy(base)
        print(name, refused)
