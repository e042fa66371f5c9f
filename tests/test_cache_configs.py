"""Configurations of any fields: refused by name, or a cache with them is what the oracle says."""

from __future__ import annotations

import dataclasses
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from cache_model import CacheModel
from cache_twins import Twins
from core_cases import HEAD_DIMS, examples
from hypothesis import given
from hypothesis import strategies as st
from one_layer import DIM
from test_core_attend import random_attend
from test_core_pack import random_pack

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.config import _CHOICES

pytest_plugins = ["core_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:MixKVQCache")
NAMES = [field.name for field in dataclasses.fields(MixKVQConfig)]
WIDTHS = [1, 2, 3, 4, 8, 16]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 70), max_size=3),
    st.dictionaries(st.integers(-1, 17), st.integers(-1, 70), max_size=3),
    st.sampled_from([10**400, -(10**400), b"3", 1j, Fraction(1, 3), np.int64(32), np.float32(2), [[]], {}, ("a", "b")]),
    st.tuples(*[st.one_of(st.floats(), st.just(10**400))] * 2),
)  # fmt: skip


@st.composite
def patterns(draw) -> tuple[dict[int, int], ...]:
    """Menus that split 64 channels in any way."""
    menu = []
    for _ in range(draw(st.integers(1, 5))):
        cuts = sorted(draw(st.lists(st.integers(0, 64), min_size=5, max_size=5)))
        counts = np.diff([0, *cuts, 64]).tolist()
        menu.append(dict(zip(draw(st.permutations(WIDTHS)), counts, strict=True)))
    return tuple(menu)


@st.composite
def sound(draw) -> dict[str, object]:
    """Fields that are allowed, all of them."""
    fields = {name: draw(st.sampled_from(choices)) for name, choices in _CHOICES.items()}
    length = draw(st.sampled_from([32, 64, 96]))
    low = draw(st.floats(0, 3))
    return fields | {
        "block_length": length,
        "residual_length": length + draw(st.integers(0, 50)),
        "sink_length": draw(st.integers(0, 40)),
        "key_group_size": draw(st.sampled_from([n for n in (32, 64, 96) if length % n == 0])),
        "key_patterns": draw(patterns()),
        "key_budget": draw(st.floats(1, 8)),
        "thresholds": (low + draw(st.floats(0, 3)), low),
        "value_group_size": draw(st.sampled_from([0, 8, 16, 24, 64, 256])),
    }


@examples(150)
@given(sound(), st.dictionaries(st.sampled_from(NAMES), ODD, max_size=2))
def test_fields_are_refused_by_name(fields, odd):
    """What is refused is the field that is odd, or one that does not fit to it."""
    try:
        config = MixKVQConfig(**fields | odd)
    except (TypeError, ValueError) as error:
        named = re.match(r"\w+", str(error)).group()
        related = (
            {"block_length", "residual_length"}
            if {"block_length", "key_group_size", "allocate"} & odd.keys()
            else set()
        )
        assert named in odd.keys() | related, error
        return
    assert MixKVQConfig.from_json(config.to_json()) == config and hash(config) is not None
    assert all(math.isfinite(x) for x in (*config.thresholds, config.key_budget))


@examples(15)
@given(sound(), st.sampled_from(HEAD_DIMS), st.sampled_from(["float32", "float16", "bfloat16"]), st.integers(0, 2**32))
def test_what_is_allowed_codes_and_attends_as_the_oracle(isa, fields, head_dim, dtype, seed):
    try:
        codec = MixKVQConfig(**fields).codec(head_dim, dtype)
    except ValueError as error:
        assert str(error).startswith("key_budget is") and fields["allocate"] in ("budget", "layer")
        return
    random_pack(seed, codec, 2, 1, [], poison=False)
    random_attend(seed, codec, 1, 2, 2, "bool", 2)


CASES = sound(), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**32 - 1)


@examples(15)
@given(*CASES)
def test_what_is_allowed_makes_a_cache_as_the_oracle(fields, dtype, seed):
    check(fields, dtype, seed)


@pytest.mark.exhaustive
@pytest.mark.slow
@examples(400, fixed=False)
@given(*CASES)
def test_what_is_allowed_makes_a_cache_as_the_oracle_at_length(fields, dtype, seed):
    check(fields, dtype, seed)


def check(fields, dtype, seed):
    config, generator = MixKVQConfig(**fields), torch.Generator().manual_seed(seed)
    twins = Twins(MixKVQCache(config, precision="exact"), CacheModel(config, 1))
    threshold = config.exact_capacity()
    try:
        config.codec(DIM, "float32")
    except ValueError as error:
        twins.cache.update(*torch.zeros(2, 1, 2, threshold, DIM, dtype=dtype), 0)
        (layer,) = twins.cache.report().layers
        assert layer.path == "native" and str(error) in layer.reason
        return
    twins.step(generator, dtype, np.arange(threshold - 3) >= np.array([[0], [5]]))
    for _ in range(10):
        twins.step(generator, dtype, np.ones((2, 1), bool))
    twins.check()
    twins.step(generator, dtype, np.ones((2, config.block_length + 9), bool))
    twins.check()
    twins.cache.crop(-30)
    twins.model.crop(30)
    twins.check()
    twins.step(generator, dtype, np.ones((2, 25), bool))
    twins.check()
