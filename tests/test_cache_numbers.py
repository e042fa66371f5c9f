"""Keys and values of any numbers: NaN, infinities, denormals, huge, constant; they are stored as the oracle does."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from cache_model import CacheModel
from cache_twins import Twins
from core_cases import TROUBLES, examples, fill
from hypothesis import given
from hypothesis import strategies as st
from one_layer import DIM, HEADS
from test_cache_model import BLOCK, CODINGS, LAYERS

from mixkvq import MixKVQCache, MixKVQConfig

pytestmark = pytest.mark.filterwarnings("ignore:MixKVQCache")
WHEN = ["prompt", "step", "late prompt"]


CASES = {
    "seed": st.integers(0, 2**32 - 1),
    "coding": st.sampled_from(list(CODINGS)),
    "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    "batch": st.integers(1, 2),
    "troubles": st.lists(st.sampled_from([*TROUBLES, "nan", "inf", "-inf"]), min_size=1, max_size=3),
    "when": st.sets(st.sampled_from(WHEN), min_size=1),
}


@examples(10)
@given(**CASES)
def test_any_numbers(tmp_path, seed, coding, dtype, batch, troubles, when):
    check(tmp_path, seed, coding, dtype, batch, troubles, when)


@pytest.mark.exhaustive
@pytest.mark.slow
@examples(100, fixed=False)
@given(**CASES)
def test_any_numbers_at_length(tmp_path, seed, coding, dtype, batch, troubles, when):
    check(tmp_path, seed, coding, dtype, batch, troubles, when)


def check(tmp_path, seed, coding, dtype, batch, troubles, when):
    """Troubles in one head of the last row: it is stored as it should be, and no other head notices."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    name, fields = CODINGS[coding]
    config = MixKVQConfig.preset(name, **BLOCK | fields)
    twins = Twins(MixKVQCache(config, precision="exact"), CacheModel(config, LAYERS))
    spoiled = np.zeros((batch, HEADS), bool)

    def spoil(x: torch.Tensor) -> None:
        """Some lines of the head in trouble, along tokens or along channels."""
        if rng.random() < 0.3:
            return
        spoiled[-1, 0] = True
        head = fill(rng, (1, 1, x.shape[2], DIM), [t for t in troubles if t in TROUBLES], int(rng.integers(2, 4)))
        for bad in {"nan", "inf", "-inf"}.intersection(troubles):
            head[0, 0, rng.integers(x.shape[2]), rng.integers(DIM)] = float(bad)
        x[-1, 0] = torch.from_numpy(head[0, 0])

    def step(tokens: int, name: str) -> None:
        change = spoil if name in when else lambda x: None
        twins.step(generator, dtype, np.ones((batch, tokens), bool), change=change, spoiled=spoiled)
        twins.check()

    step(70, "prompt")
    for _ in range(35):
        step(1, "step")
    step(50, "late prompt")
    twins.cache.crop(-20)
    twins.model.crop(20)
    twins.check()
    twins.cache.save(tmp_path / "cache")
    for made in (
        copy.deepcopy(twins.cache),
        pickle.loads(pickle.dumps(twins.cache)),
        MixKVQCache.load(tmp_path / "cache"),
    ):
        Twins(made, twins.model).check()
