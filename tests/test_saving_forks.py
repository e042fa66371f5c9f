"""Forks: they share records and nothing else."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import forward, generate, lossless, paths, prompts, tiny
from test_cache_operations import PRESETS, filled
from test_saving import records, step, told
from versions import needs_linear

from mixkvq import MixKVQCache
from mixkvq.layer import MixKVQLayer
from mixkvq.report import held_bytes

SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}


def slabs(cache):
    stores = [layer.store for layer in cache.layers if isinstance(layer, MixKVQLayer)]
    return [slab for store in stores if store is not None for slab in store.records.slabs]


def tensors(cache):
    return [t for layer in cache.layers for t in layer.tensors()]


@pytest.mark.parametrize("preset", PRESETS)
def test_forks_share_the_records_and_nothing_else(preset):
    cache, _ = filled(preset)
    forks = cache.fork(3)
    assert len(forks) == 3 and all(type(fork) is MixKVQCache for fork in forks)
    for fork in forks:
        assert [s.data_ptr() for s in slabs(fork)] == [s.data_ptr() for s in slabs(cache)]
        assert told(fork) == told(cache) and fork.report().nbytes == cache.report().nbytes
        addresses = {t.data_ptr() for t in tensors(cache)} & {t.data_ptr() for t in tensors(fork)}
        assert addresses == {s.data_ptr() for s in slabs(cache)}
    alone, shared = held_bytes(tensors(cache)), held_bytes(slabs(cache))
    everything = held_bytes([t for each in (cache, *forks) for t in tensors(each)])
    assert everything == 4 * alone - 3 * shared and shared > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_each_fork_goes_on_as_the_cache_would(preset):
    """Other tokens in each, over several blocks; cropped, reordered and emptied in one, nothing happens to others."""
    cache, mask = filled(preset)
    forks, (same, mask_again) = cache.fork(3), filled(preset)
    before = records(cache)
    forks[2].crop(-120)
    forks[1].reorder_cache(torch.tensor([2, 2, 2]))
    forks[2].reset()
    for seed in range(40):
        (got, longer), (want, _) = step(forks[0], mask, seed), step(same, mask_again, seed)
        assert torch.equal(got, want)
        mask = mask_again = longer
    assert records(forks[0]) == records(same) and records(cache) == before
    assert forks[2].report().nbytes == 0 and len(forks[2].layers) == 0


def test_forks_outlive_the_cache():
    cache, mask = filled()
    want = records(cache)
    (fork,) = cache.fork(1)
    del cache
    gc.collect()
    assert records(fork) == want and step(fork, mask)[0].isfinite().all()


def test_forks_in_threads():
    cache, mask = filled()
    ready = threading.Barrier(4)

    def run(fork, first):
        ready.wait()
        logits, longer = [], mask
        for seed in range(40):
            got, longer = step(fork, longer, first + seed)
            logits.append(got)
        return torch.stack(logits)

    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, cache.fork(4), range(4)))
    ready = threading.Barrier(1)
    for first, fork in enumerate(cache.fork(4)):
        assert torch.equal(run(fork, first), got[first])


@needs_linear
@pytest.mark.parametrize("family", ["gemma3", "qwen3_next", "falcon_h1"])
def test_other_layers_are_copied(family):
    model, inputs = tiny(family), prompts([90])
    cache = MixKVQCache(**SHORT)
    forward(model, cache, inputs["input_ids"])
    answers = []
    for fork in cache.fork(2):
        inputs_ = {name: torch.cat([t, torch.ones_like(t[:, :1])], 1) for name, t in inputs.items()}
        answers.append(generate(model, inputs_, fork, 40))
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert all(torch.equal(a, b) for a, b in zip(answers[0].logits, answers[1].logits, strict=True))


def test_a_cache_that_has_packed_nothing_or_holds_nothing():
    for tokens in (0, 20):
        cache = lossless()
        if tokens:
            forward(tiny(), cache, prompts([tokens])["input_ids"])
        fork = cache.fork(1)[0]
        assert fork.get_seq_length() == tokens
        forward(tiny(), fork, prompts([80])["input_ids"])
        assert paths(fork) == ["packed", "packed"] and cache.get_seq_length() == tokens


def test_a_configuration_is_shared_and_a_file_can_be_forked(tmp_path):
    cache = MixKVQCache(config=tiny().config, **SHORT)
    forward(tiny(), cache, prompts([90])["input_ids"])
    cache.save(tmp_path / "c")
    mask = torch.ones(1, 90, dtype=torch.long)
    for source in (cache, MixKVQCache.load(tmp_path / "c", tiny().config), MixKVQCache.load(tmp_path / "c")):
        for fork in source.fork(2):
            assert fork._model_config is source._model_config
            assert torch.equal(step(fork, mask)[0], step(cache.fork(1)[0], mask)[0])


@pytest.mark.parametrize(
    "n, error", [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.0, TypeError), (True, TypeError)]
)
def test_numbers_of_forks(n, error):
    with pytest.raises(error, match=f"n is {n!r}"):
        MixKVQCache().fork(n)


def test_gradients_are_refused():
    cache = MixKVQCache()
    forward(tiny(), cache, prompts([40])["input_ids"], gradients=True)
    with pytest.raises(ValueError, match=r"cannot be forked: layer 0 .*no_grad"):
        cache.fork(2)
