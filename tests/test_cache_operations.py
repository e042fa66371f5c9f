"""crop, reorder, select, repeat, copies: on packed, quantized data, as on the dense tensors that it decodes to."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from models import dense_copy, forward, generate, lossless, paths, prompts, relative_gap, tiny
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer
from versions import needs_linear

from mixkvq import MixKVQCache, compat, ops
from mixkvq.layer import MixKVQLayer

FIELDS = {"block_length": 32, "residual_length": 32, "key_group_size": 32, "sink_length": 4, "precision": "exact"}
PRESETS = ["default", "kivi-2", "paper", "layer"]
MODES = {"layer": ("default", {"allocate": "layer", "key_budget": 4})}
LENGTHS = [150, 110, 77]


def filled(preset: str = "default", lengths=LENGTHS, extra: int = 5, **changes):
    """A packed cache after a padded prompt and some steps, and the mask so far."""
    model, inputs = tiny("llama"), prompts(lengths)
    name, fields = MODES.get(preset, (preset, {}))
    cache, mask = MixKVQCache(name, **FIELDS | fields | changes), inputs["attention_mask"]
    forward(model, cache, inputs["input_ids"], mask)
    for step in range(extra):
        mask = torch.cat([mask, torch.ones(len(lengths), 1, dtype=torch.long)], 1)
        forward(model, cache, torch.full((len(lengths), 1), step + 2), mask)
    assert all(int(layer.store.blocks.min()) >= 1 for layer in cache.layers)
    return cache, mask


@pytest.mark.parametrize("precision", ["default", "exact", "fast"])
@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_the_precision_of_attention(monkeypatch, preset, precision):
    """Every call of a packed layer has it; where nothing is rounded, attention is exact."""
    cache, _ = filled(preset, [150], precision=precision)
    seen, attend = [], ops.attend
    monkeypatch.setattr(ops, "attend", lambda *args: seen.append(args[7]) or attend(*args))
    for wanted in (None, torch.ones(1, 1, 1, 157, dtype=torch.bool)):  # the short path; a call checked in full
        forward(tiny("llama"), cache, torch.full((1, 1), 7), wanted)
    assert seen == ["exact" if preset == "lossless" else precision] * 4


@needs_linear
def test_the_precision_of_hybrid_layers():
    cache = MixKVQCache(precision="fast")
    generate(tiny("qwen3_next"), prompts([60]), cache, 3)
    assert cache.layers[1].precision == "fast"


def assert_equal_step(cache: MixKVQCache, mask: torch.Tensor) -> None:
    """The next step over packed records equals the next step over what they decode to."""
    dense, model, batch = dense_copy(cache), tiny("llama"), mask.shape[0]
    mask = torch.cat([mask, torch.ones(batch, 1, dtype=torch.long)], 1)
    ids = torch.arange(2, 2 + batch).view(-1, 1)
    before = [layer.dequantizations for layer in cache.layers]
    assert relative_gap(forward(model, cache, ids, mask), forward(model, dense, ids, mask)) < 1e-5
    assert [layer.dequantizations for layer in cache.layers] == before, "nothing was decoded for it"


def decoded(cache: MixKVQCache) -> list[torch.Tensor]:
    return [t for layer in cache.layers for t in (layer.keys, layer.values)]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_packed_step_equals_a_step_over_the_decoded_tensors(preset):
    assert_equal_step(*filled(preset))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("remove", [1, 3, 20, 33, 60, 79, 90, 118, 130, 149, 152, 154])
def test_crop(preset, remove):
    cache, mask = filled(preset)
    before, keep = decoded(cache), 155 - remove
    cache.crop(-remove)
    assert cache.get_seq_length() == keep
    assert all(torch.equal(has, had[:, :, :keep]) for has, had in zip(decoded(cache), before, strict=True))
    mask = mask[:, :keep]
    assert_equal_step(cache, mask)
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    for step in range(70):  # new blocks are packed behind the cut
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        forward(tiny("llama"), cache, torch.full((3, 1), step + 2), mask)
    assert_equal_step(cache, mask)
    cache.crop(-70)
    assert_equal_step(cache, mask[:, :-70])


def test_crop_of_everything_and_of_nothing():
    cache, _ = filled()
    cache.crop(torch.tensor(-5))
    before = decoded(cache)
    assert cache.get_seq_length() == 150
    if compat.VERSION >= (5, 20):  # before, a positive argument was the new length
        with pytest.raises(ValueError, match="negative"):
            cache.crop(3)
    else:
        cache.crop(150)
        cache.crop(151)
    if compat.VERSION >= (5, 14):  # before, it was a new length too
        cache.crop(0)
    assert all(torch.equal(a, b) for a, b in zip(decoded(cache), before, strict=True))
    cache.crop(-1000 if compat.VERSION >= (5, 14) else 0)
    assert cache.get_seq_length() == 0 and cache.report().nbytes == 0
    model, inputs = tiny("llama"), prompts([90, 60])
    want, got = (generate(model, inputs, c, 8) for c in (DynamicCache(), cache))
    assert torch.equal(want.logits[0], got.logits[0]), "another batch size may follow"


def test_crop_of_a_plain_cache():
    model, inputs = tiny("llama"), prompts([20, 9])
    cache, expected = lossless(), DynamicCache()
    for c in (cache, expected):
        forward(model, c, inputs["input_ids"], inputs["attention_mask"])
        c.crop(-13)
    assert all(t.untyped_storage().nbytes() == t.nbytes for layer in cache.layers for t in layer.tensors()), (
        "memory is freed"
    )
    ids = torch.full((2, 60), 5)
    a, b = (forward(model, c, ids, torch.ones(2, 67, dtype=torch.long)) for c in (expected, cache))
    assert relative_gap(b, a) < 1e-5 and cache.layers[0].store.start.tolist() == [0, 0]


OPERATIONS = {
    "reorder": (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
    "select tensor": (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select list": (lambda c: c.batch_select_indices([1]), [1]),
    "select mask": (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "select tuple": (lambda c: c.batch_select_indices((2, 0)), [2, 0]),
    "select slice": (lambda c: c.batch_select_indices(slice(1, None)), [1, 2]),
    "repeat": (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_move(preset, name):
    operation, rows = OPERATIONS[name]
    cache, mask = filled(preset)
    before = decoded(cache)
    statistics = [layer.queries.sum for layer in cache.layers]
    operation(cache)
    assert all(torch.equal(has, had[rows]) for has, had in zip(decoded(cache), before, strict=True))
    for layer, had in zip(cache.layers, statistics, strict=True):
        assert had is None or torch.equal(layer.queries.sum, had[rows])
    assert_equal_step(cache, mask[rows])


@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_of_a_plain_cache_move(name):
    operation, rows = OPERATIONS[name]
    model, inputs = tiny("llama"), prompts([20, 12, 5])
    cache, expected = MixKVQCache(**FIELDS), DynamicCache()
    for c in (cache, expected):
        forward(model, c, inputs["input_ids"], inputs["attention_mask"])
        operation(c)
    mask = torch.cat([inputs["attention_mask"][rows], torch.ones(len(rows), 40, dtype=torch.long)], 1)
    a, b = (forward(model, c, torch.full((len(rows), 40), 7), mask) for c in (expected, cache))
    assert torch.equal(a, b)
    assert cache.layers[0].store.start.tolist() == [[0, 8, 15][r] for r in rows]
    assert_equal_step(cache, mask)


@needs_linear
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_of_a_hybrid_layer_move_with_their_states(name):
    operation, rows = OPERATIONS[name]
    model, inputs = tiny("falcon_h1"), prompts([60, 60, 60])
    cache = lossless()
    forward(model, cache, inputs["input_ids"])
    ids = torch.tensor([[5], [6], [7]])
    want = forward(model, copy.deepcopy(cache), ids)[rows]
    operation(cache)
    assert relative_gap(forward(model, cache, ids[rows]), want) < 1e-5


def test_repeated_rows_share_records():
    cache, _ = filled()
    before = cache.report()
    cache.batch_repeat_interleave(10)
    after = cache.report()
    assert [a.record_bytes for a in after.layers] == [b.record_bytes for b in before.layers]
    assert after.true_bits == before.true_bits and after.effective_bits < before.effective_bits


@pytest.mark.parametrize("wrong", [torch.tensor([0, 3]), torch.tensor([-4, 0])])
def test_rows_that_do_not_exist_are_refused(wrong):
    cache, mask = filled()
    before = decoded(cache)
    for operation in (cache.reorder_cache, cache.batch_select_indices):
        with pytest.raises(IndexError):
            operation(wrong)
    assert all(torch.equal(a, b) for a, b in zip(decoded(cache), before, strict=True))
    assert_equal_step(cache, mask)


# ---- copies --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("preset", PRESETS)
def test_copies_are_equal_and_independent(preset, how):
    cache, mask = filled(preset)
    other, before = how(cache), decoded(cache)
    assert all(torch.equal(a, b) for a, b in zip(decoded(other), before, strict=True))
    assert str(other.report()).splitlines()[1:3] != [] and other.report().true_bits == cache.report().true_bits
    assert_equal_step(other, mask)
    other.crop(-100)
    other.reset()
    assert all(torch.equal(a, b) for a, b in zip(decoded(cache), before, strict=True))
    peak = cache.report().peak_nbytes
    forward(tiny("llama"), other, torch.full((1, 500), 3))
    assert cache.report().peak_nbytes == peak, "accounts are apart"
    assert_equal_step(cache, mask)


@pytest.mark.parametrize("tokens", [40, 300])
@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_shallow_copies_of_layers_go_on_alone(preset, tokens):
    """As snapshots of a `DynamicCache` do, whose layers replace their tensors."""
    model, ids = tiny("llama"), prompts([tokens])["input_ids"]
    steps = torch.arange(1, 13).view(12, 1, 1)

    def go_on(cache, at):
        return torch.cat([forward(model, cache, step) for step in steps[at]])

    def begun():
        cache = MixKVQCache(preset)
        forward(model, cache, ids)
        return cache

    cache = begun()
    snapshot = copy.copy(cache)
    snapshot.layers = [copy.copy(layer) for layer in cache.layers]
    mine = go_on(cache, slice(0, 6))
    theirs = go_on(snapshot, slice(6, 12))
    assert torch.equal(torch.cat([mine, go_on(cache, slice(6, 9))]), go_on(begun(), slice(0, 9)))
    assert torch.equal(theirs, go_on(begun(), slice(6, 12)))
    if tokens == 300:
        slabs, others = (each.layers[0].store.records.slabs for each in (cache, snapshot))
        assert slabs[0] is others[0] and not any(t.is_shared() for t in slabs), "records are never written again"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_copies_of_an_empty_cache(how):
    cache = how(MixKVQCache("compact", sink_length=8))
    assert cache.mixkvq_config.sink_length == 8
    forward(tiny("llama"), cache, prompts([200])["input_ids"])
    assert cache.report().layers[0].path == "packed"


def test_no_reference_cycles():
    """Without the garbage collector the memory is free as soon as the last name is."""
    model = tiny("llama")
    generate(model, prompts([40]), lossless(), 2)  # whatever is made once is made
    gc.collect()
    gc.disable()
    try:
        cache = lossless()
        generate(model, prompts([60, 40]), cache, 40, num_beams=2)
        cache.crop(-3)
        cache.report()
        held = [
            weakref.ref(x)
            for x in (cache, cache.layers[0], cache.layers[1].store, cache.layers[0].store.records.slabs[0])
        ]
        del cache
        assert [ref() for ref in held] == [None] * 4
    finally:
        gc.enable()


def test_one_row_is_a_batch_of_one():
    """Where the stock cache loses the dimension, and fails at the next update."""
    one, many = filled()[0], filled()[0]
    one.batch_select_indices(1)
    many.batch_select_indices([1])
    assert all(torch.equal(a, b) for a, b in zip(decoded(one), decoded(many), strict=True))


@pytest.mark.parametrize("preset", ["plain", "default"])
@pytest.mark.parametrize("none", [[], torch.zeros(3, dtype=torch.bool), slice(0)])
def test_an_empty_batch_goes_on(preset, none):
    model, cache = tiny("llama"), lossless() if preset == "plain" else filled()[0]
    if preset == "plain":
        inputs = prompts([20, 12, 5])
        forward(model, cache, inputs["input_ids"], inputs["attention_mask"])
    length = cache.get_seq_length()
    cache.batch_select_indices(none)
    for index, layer in enumerate(cache.layers):
        for tokens in (40, 1, 1):
            keys, values = cache.update(*torch.randn(2, 0, 2, tokens, 16), index)
            assert len(keys) == len(values) == 0
        assert keys.shape[2] == length + 42
        assert layer.keys.shape == (0, 2, length + 42, 16)


# ---- from outside --------------------------------------------------------------------------------------------------
def test_iterating_gives_decoded_tensors():
    cache, _ = filled()
    for (keys, values, *_), layer in zip(cache, cache.layers, strict=True):
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("told", [False, True])
def test_a_cache_of_the_keys_and_values_of_others(family, told):
    model, inputs = tiny(family, "eager"), prompts([90, 70])
    config = {"config": model.config} if told else {}
    parts = []
    for row in (0, 1):
        parts.append(MixKVQCache("lossless", config=model.config))
        forward(model, parts[-1], inputs["input_ids"][row : row + 1], inputs["attention_mask"][row : row + 1])

    def gather(states):
        *states, windows = zip(*states, strict=True)  # of the same window, as a vector: old versions want one
        return *map(torch.cat, states), None if windows[0] is None else windows[0].view(1)

    expected, mask = DynamicCache(map(gather, zip(*parts, strict=True)), **config), inputs["attention_mask"]
    caches = [
        MixKVQCache(map(gather, zip(*parts, strict=True)), **config, **FIELDS),
        lossless(ddp_cache_data=map(gather, zip(*parts, strict=True)), **config),
    ]
    assert [type(a) for a in caches[0].layers if type(a) is not MixKVQLayer] == [
        type(a) for a in expected.layers if type(a) is not DynamicLayer
    ]
    for step in range(2):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
        want, *got = (forward(model, c, torch.full((2, 1), step + 5), mask) for c in (expected, *caches))
        assert torch.allclose(got[1], want, atol=1e-5) and relative_gap(got[0], want) < 0.5
    assert "packed" in paths(caches[0]) and paths(caches[0]) == paths(caches[1])


def test_assigned_tensors_are_taken_over():
    cache, mask = filled()
    for layer in cache.layers:
        keys, values = layer.keys * 2, layer.values
        with nullcontext() if layer.index else pytest.warns(UserWarning, match="layer 0: .* assigned"):
            layer.keys = keys
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
        assert layer.path == "native" and "assigned" in layer.reason.what
    dense = dense_copy(cache)
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    a, b = (forward(tiny("llama"), c, torch.full((3, 1), 9), mask) for c in (dense, cache))
    assert torch.equal(a, b)
    assert cache.layers[0].path == "packed", "and packed again"


@pytest.mark.parametrize("order", [("keys", "values"), ("values", "keys")])
@pytest.mark.parametrize("told", [False, True])
def test_keys_and_values_assigned_to_an_empty_layer(order, told):
    model, (cache, mask) = tiny("llama"), filled("lossless")
    other = lossless(config=model.config) if told else lossless()
    states = [{"keys": layer.keys, "values": layer.values} for layer in cache.layers]
    if not told:
        for index, state in enumerate(states):
            other.update(state["keys"][:, :, :1], state["values"][:, :, :1], index)
        other.crop(-1)
    for layer, state in zip(other.layers, states, strict=True):
        setattr(layer, order[0], state[order[0]])
        assert layer.get_seq_length() == 0
        with pytest.raises(ValueError, match=r"None.*were assigned to a layer"):
            layer.update(*state.values())
        setattr(layer, order[1], state[order[1]])
    assert other.get_seq_length() == cache.get_seq_length()
    mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    a, b = (forward(model, c, torch.full((3, 1), 9), mask) for c in (cache, other))
    assert torch.allclose(a, b, atol=1e-5) and paths(other) == ["packed"] * len(states)


def test_assigning_none_empties_a_layer():
    cache, _ = filled()
    for layer in cache.layers:
        states = layer.keys, layer.values
        with nullcontext() if layer.index else pytest.warns(UserWarning, match="layer 0: .* assigned"):
            layer.keys = None
        assert layer.keys is None and torch.equal(layer.values, states[1]) and layer.get_seq_length() == 0
        layer.values = None
        assert layer.values is None and not layer.is_initialized and "nothing cached" in layer.reason.what
        layer.update(*states)
        assert layer.get_seq_length() == states[0].shape[2]


def test_what_is_assigned_and_cannot_be_packed_stays_in_full_precision():
    cache = MixKVQCache(config=tiny("llama").config)
    cache.layers[0].keys, cache.layers[0].values = torch.randn(1, 2, 300, 12), torch.randn(1, 2, 300, 12)
    assert "no packed kernels" in cache.layers[0].reason.what and cache.get_seq_length() == 300
    cache.update(torch.randn(1, 2, 1, 12), torch.randn(1, 2, 1, 12), 0)
    cache.update(torch.randn(1, 2, 1, 12), torch.randn(1, 2, 1, 12), 0)
    assert cache.layers[0].path == "native" and cache.get_seq_length() == 302


def test_cross_attention_that_reads_records_in_every_step_is_reported():
    cross = lossless()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(tiny("bart"), prompts([100]), EncoderDecoderCache(lossless(), cross), 5)
    for layer in cross.report().layers:
        assert layer.path == "packed" and layer.dequantizations >= 4
        assert "EncoderDecoderCache(MixKVQCache(), DynamicCache())" in layer.decoded_for.remedy
    assert "decoded at times: keys or values were read" in str(cross.report())


def test_in_an_encoder_decoder_cache():
    pair = EncoderDecoderCache(MixKVQCache(), DynamicCache())
    k = torch.randn(1, 2, 20, 16)
    pair.self_attention_cache.update(k, k, 0)
    pair.reorder_cache(torch.tensor([0]))
    pair.crop(-5)
    assert pair.get_seq_length() == 15 and not pair.is_compileable
