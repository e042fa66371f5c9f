"""Random walks of caches beside their models: any order of operations, on any copy, gives what `cache_model` says.

After every step every cache is compared with its model in full, so that a change of one that reaches a copy shows.
The default run takes a few hundred steps; ``-m exhaustive`` more than 10 000, and prints how many.
"""

from __future__ import annotations

import copy
import math
import pickle
import tempfile
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_model import CacheModel
from cache_twins import Twins
from core_cases import SHARE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from one_layer import DIM, HEADS

from mixkvq import MixKVQCache, MixKVQConfig, compat
from mixkvq.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("ignore:MixKVQCache")

LAYERS, MOST_COLUMNS, MOST_CACHES, MOST_ROWS = 2, 230, 3, 4
LEAST_CROP = 0 if compat.VERSION >= (5, 14) else 1  # before, 0 was a length
BLOCK = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
CODINGS = {name: (name, {}) for name in PRESETS} | {
    "paper": ("paper", {"thresholds": (1.0, 0.4)}),
    "layer": ("default", {"allocate": "layer", "key_budget": 4}),
    "budget": ("default", {"allocate": "budget", "key_budget": 4}),
    "exact values": ("default", {"value_bits": 16, "value_basis": "identity"}),
}
DTYPES = [torch.float32, torch.float32, torch.float16, torch.bfloat16]
STEPS, PACKED = Counter(), Counter()  # steps taken by rule; those of packed caches
which, seeds, rows_of = (
    st.integers(0, MOST_CACHES - 1),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
)


def make_room(twins: Twins, tokens: int) -> None:
    """Keep caches short: what is tested happens at the ends."""
    if twins.model.length + tokens > MOST_COLUMNS:
        twins.cache.crop(-150)
        twins.model.crop(150)


class Walk(RuleBasedStateMachine):
    """A few caches, each with a model; every rule is one step of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.twins: list[Twins] = []
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        coding=st.sampled_from(list(CODINGS)),
        dtype=st.sampled_from(DTYPES),
        precision=st.sampled_from(["exact", "exact", "default"]),
        sink=st.sampled_from([0, 1, 4]),
        more=st.sampled_from([0, 0, 7, 40]),
        rollback=st.sampled_from([False, False, True]),
    )
    def begin(self, coding, dtype, precision, sink, more, rollback):
        name, fields = CODINGS[coding]
        config = MixKVQConfig.preset(name, **BLOCK | fields | {"sink_length": sink, "residual_length": 32 + more})
        self.dtype = dtype
        cache = MixKVQCache(config, precision=precision)
        if rollback:
            cache.activate_past_recording()
        self.twins = [Twins(cache, CacheModel(config, LAYERS, config.block_length if rollback else 0))]

    def chosen(self, name: str, at: int) -> Twins:
        twins = self.twins[at % len(self.twins)]
        STEPS[name] += 1
        PACKED[name] += twins.model.layers[0].packed
        return twins

    # ---- growing ----
    @rule(at=which, seed=seeds, tokens=st.integers(1, 40), style=st.integers(0, 3))
    def decode(self, at, seed, tokens, style):
        """Tokens one by one."""
        twins, generator = self.chosen("decode", at), torch.Generator().manual_seed(seed)
        make_room(twins, tokens)
        batch = max(twins.model.batch, 1)
        for _ in range(tokens):
            twins.step(generator, self.dtype, np.ones((batch, 1), bool), style)

    @rule(
        at=which,
        seed=seeds,
        tokens=st.integers(2, 90),
        style=st.integers(0, 3),
        padding=st.lists(st.integers(0, 90), min_size=MOST_ROWS, max_size=MOST_ROWS),
        batch=st.integers(1, MOST_ROWS),
    )
    def prompt(self, at, seed, tokens, style, padding, batch):
        """Several tokens at once; rows that are packed, or have no token yet, may begin with padding."""
        twins, generator = self.chosen("prompt", at), torch.Generator().manual_seed(seed)
        model = twins.model
        make_room(twins, tokens)
        packed = model.layers[0].packed
        batch = model.batch if model.length else batch
        begun = [bool(model.length and model.visible[row].any()) and not packed for row in range(batch)]
        first = [0 if has else min(pad, tokens) for has, pad in zip(begun, padding, strict=False)]
        visible = np.arange(tokens) >= np.array(first)[:, None]
        twins.step(generator, self.dtype, visible, style)

    @rule(at=which, seed=seeds, tokens=st.integers(1, 40))
    def fill(self, at, seed, tokens):
        """Tokens without attention, as who fills a cache by hand hands them over; packed layers pack them later."""
        twins, generator = self.chosen("fill", at), torch.Generator().manual_seed(seed)
        make_room(twins, tokens)
        if twins.model.layers[0].packed and twins.seen:
            twins.fill(generator, self.dtype, tokens)
        else:
            twins.step(generator, self.dtype, np.ones((max(twins.model.batch, 1), tokens), bool), 0)

    # ---- shortening and moving ----
    @rule(at=which, remove=st.one_of(st.integers(LEAST_CROP, 40), st.integers(LEAST_CROP, MOST_COLUMNS)))
    def crop(self, at, remove):
        twins = self.chosen("crop", at)
        twins.cache.crop(-remove)
        twins.model.crop(remove)

    @rule(at=which, rows=rows_of)
    def reorder(self, at, rows):
        twins = self.chosen("reorder", at)
        rows = [row % max(twins.model.batch, 1) for row in rows]
        index = torch.tensor(rows)
        twins.cache.reorder_cache(index)
        twins.model.gather(rows, lambda stock: stock.reorder_cache(index))

    @rule(at=which, rows=rows_of, form=st.sampled_from(["list", "tensor", "mask", "slice"]))
    def select(self, at, rows, form):
        twins = self.chosen("select", at)
        batch = max(twins.model.batch, 1)
        rows = [row % batch for row in rows]
        chosen = {"list": rows, "tensor": torch.tensor(rows) - batch}
        if form == "mask":
            rows = sorted(set(rows))
            chosen["mask"] = torch.isin(torch.arange(batch), torch.tensor(rows))
        elif form == "slice":
            chosen["slice"] = slice(rows[0], None)
            rows = list(range(batch))[rows[0] :]
        twins.cache.batch_select_indices(chosen[form])
        twins.model.gather(rows, lambda stock: stock.batch_select_indices(chosen[form]))

    @rule(at=which, repeats=st.integers(1, MOST_ROWS))
    def repeat(self, at, repeats):
        twins = self.chosen("repeat", at)
        batch = twins.model.batch
        repeats = min(repeats, MOST_ROWS // max(batch, 1))
        twins.cache.batch_repeat_interleave(repeats)
        rows = [row for row in range(batch) for _ in range(repeats)]
        twins.model.gather(rows, lambda stock: stock.batch_repeat_interleave(repeats))

    @rule(at=which, sure=st.integers(1, 4))
    def reset(self, at, sure):
        if sure < 4:
            return
        twins = self.chosen("reset", at)
        twins.cache.reset()
        twins.model.clear()

    # ---- copies ----
    @rule(at=which, to=which, how=st.sampled_from(["deepcopy", "pickle", "sent", "file", "fork"]))
    def copy(self, at, to, how):
        """Another cache with the same content, beside the others or in the place of one of them."""
        twins = self.chosen(how, at)
        cache = twins.cache
        if how == "deepcopy":
            made = copy.deepcopy(cache)
        elif how == "pickle":
            made = pickle.loads(pickle.dumps(cache))
        elif how == "sent":
            made = pickle.loads(ForkingPickler.dumps(cache))
        elif how == "file":
            path = Path(self.folder.name) / "cache"
            try:
                cache.save(path)
            except ValueError as error:
                assert "columns are padding" in str(error) and not twins.model.visible.any()
                return
            made = MixKVQCache.load(path)
        else:
            (made,) = cache.fork(1)
        new = Twins(made, copy.deepcopy(twins.model), seen=twins.seen and how != "file")
        own, other = ({t.data_ptr() for layer in c.layers for t in layer.tensors() if t.numel()} for c in (cache, made))
        slabs = {s.data_ptr() for layer in cache.layers if layer.store is not None for s in layer.store.records.slabs}
        assert own & other == (slabs if how == "fork" else set())
        if len(self.twins) < MOST_CACHES:
            self.twins.append(new)
        else:
            self.twins[to] = new

    # ---- refusals ----
    @rule(
        at=which,
        index=st.integers(0, LAYERS - 1),
        wrong=st.sampled_from(["batch", "heads", "head_dim", "tokens"]),
        row=st.integers(MOST_ROWS, 9),
    )
    def refuse(self, at, index, wrong, row):
        twins = self.chosen("refuse", at)
        sizes = dict(
            zip(("batch", "heads", "tokens", "head_dim"), (max(twins.model.batch, 1), HEADS, 3, DIM), strict=True)
        )
        good = torch.zeros(*sizes.values(), dtype=self.dtype)
        bad = torch.zeros(*(sizes | {wrong: sizes[wrong] + 8}).values(), dtype=self.dtype)
        if twins.model.length or wrong in ("batch", "tokens"):
            with pytest.raises(ValueError, match="value_states has shape"):
                twins.cache.update(good, bad, index)
        if twins.model.length:
            for operation in (twins.cache.reorder_cache, twins.cache.batch_select_indices):
                with pytest.raises(IndexError):
                    operation(torch.tensor([0, row]))

    @invariant()
    def all_are_as_their_models(self):
        for twins in self.twins:
            twins.check()


def walk(walks: int, steps: int, *, fixed: bool) -> None:
    """So many walks of so many steps; the steps taken are counted in `STEPS`."""
    STEPS.clear(), PACKED.clear()
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=max(4, math.ceil(walks * SHARE)),
            stateful_step_count=steps,
            derandomize=fixed,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_walk():
    walk(10, 40, fixed=True)
    assert sum(STEPS.values()) >= 300 * SHARE and sum(PACKED.values()) >= 50 * SHARE, (STEPS, PACKED)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_long_walk(capsys):
    walk(250, 60, fixed=False)
    with capsys.disabled():
        print(f"\n{sum(STEPS.values())} steps, {sum(PACKED.values())} of them on packed caches: {dict(STEPS)}")
    assert sum(STEPS.values()) >= 10_000 * SHARE and len(STEPS) == 13
