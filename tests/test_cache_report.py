"""The report's numbers, counted again in other ways."""

from __future__ import annotations

import gc
import re
import types
import warnings
import weakref

import pytest
import torch
from models import forward, generate, lossless, prompts, tiny
from one_layer import DIM, HEADS, Module, attention, found, packed_layer
from versions import needs_linear

from mixkvq import MixKVQCache, _core
from mixkvq.handle import PackedHandle
from mixkvq.ops import codec
from mixkvq.store import SLAB_COLUMNS

TOKENS = 700
LEAVES = (type, types.ModuleType, types.FunctionType, types.MethodType, types.BuiltinFunctionType, weakref.ref)


def held_bytes(cache) -> int:
    """Bytes of every tensor that can be reached from the cache, found by the garbage collector's view of it."""
    seen, storages, queue = set(), {}, [cache]
    while queue:
        thing = queue.pop()
        if (
            id(thing) in seen
            or isinstance(thing, (*LEAVES, torch.nn.Module))
            or type(thing).__name__.endswith("Config")
        ):
            continue
        seen.add(id(thing))
        if isinstance(thing, PackedHandle):  # a shape without storage
            queue.append(thing.layer)
        elif isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            queue += gc.get_referents(thing)
    return sum(storages.values())


def up64(n: int) -> int:
    return -(-n // 64) * 64


def formula_bytes(info: dict, dtype_bytes: int) -> int:
    """Length of a record by docs/format.md, sections 2 and 6."""
    dim, tokens = info["head_dim"], info["tokens"]
    if info["kind"] == 1:
        return up64(64 + 2 * tokens * dim * dtype_bytes)
    n1, n2, n3, n4, n8, exact = info["channels"]
    width = {0: 1, 1: 2}
    coded = dim - exact
    key_metadata = 2 * width[info["key_metadata"]] * (tokens // info["key_group"]) * coded
    groups = -(-dim // info["value_group"]) if info["value_bits"] else 0
    value_metadata = 2 * width[info["value_metadata"]] * tokens * groups
    columns = -(-n8 // 4) + -(-n4 // 8) + -(-(n3 + n2) // 16) + -(-(n3 + n1) // 32)
    values = {1: tokens // 32, 2: tokens // 16, 3: tokens // 16 + tokens // 32, 4: tokens // 8, 8: tokens // 4}
    value_bytes = 4 * dim * values[info["value_bits"]] if info["value_bits"] else tokens * dim * dtype_bytes
    head = up64(up64(32 + 3 * dim // 8) + key_metadata + value_metadata)
    return up64(head + 4 * tokens * columns + exact * tokens * dtype_bytes + value_bytes)


SYSTEMS = [
    ("default", {}),
    ("compact", {}),
    ("near-lossless", {}),
    ("paper", {}),
    ("kivi-2", {}),
    ("kivi-4", {}),
    ("lossless", {}),
    ("default", {"allocate": "threshold", "thresholds": (1.0, 0.3)}),
    ("default", {"allocate": "budget", "key_budget": 4}),
    ("compact", {"allocate": "layer", "key_budget": 4, "pattern_cost": "measured"}),
    ("default", {"key_patterns": ({16: 8, 4: 56},), "value_bits": 16, "key_metadata": "fp16"}),
    ("default", {"key_patterns": ({8: 1, 1: 63},), "value_bits": 1, "value_metadata": "fp16", "value_group_size": 8}),
]


def used(preset, fields, family="llama", dtype=torch.float32):
    model, inputs = tiny(family, dtype=dtype), prompts([TOKENS, 400])
    cache = MixKVQCache(preset, **fields)
    generate(model, inputs, cache, 3)
    return cache


@pytest.mark.parametrize("preset, fields", SYSTEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_and_bytes(preset, fields, dtype):
    cache = used(preset, fields, dtype=dtype)
    report = cache.report()
    records = {
        (index, bytes(layer.store.record(row, head, block)))
        for index, layer in enumerate(cache.layers)
        for row, blocks in enumerate(layer.store.blocks.tolist())
        for head in range(2)
        for block in range(blocks)
    }
    infos = [_core.inspect(record) for _, record in records]
    elements = sum(2 * info["tokens"] * info["head_dim"] for info in infos)
    want = 8 * sum(formula_bytes(info, dtype.itemsize) for info in infos) / elements
    assert abs(report.true_bits - want) < 1e-9
    assert report.nbytes == held_bytes(cache) == sum(layer.nbytes for layer in report.layers)
    row_tokens = [TOKENS + 2, 400 + 2]
    assert [layer.elements for layer in report.layers] == [2 * 2 * 16 * sum(row_tokens)] * 2
    assert report.effective_bits == pytest.approx(8 * report.nbytes / (2 * 2 * 2 * 16 * sum(row_tokens)), abs=1e-12)
    for layer in report.layers:
        assert layer.code_bytes > 0 and layer.metadata_bytes >= 0 and layer.overhead_bytes >= 0
        assert layer.code_bytes + layer.metadata_bytes + layer.overhead_bytes == layer.record_bytes
        assert layer.tokens == TOKENS + 2


def test_presets_have_the_documented_true_bits():
    """docs/format.md section 6 and codec.md: at head_dim 64."""
    nbytes = {"compact": 5056, "default": 6720, "near-lossless": 8768, "kivi-2": 6208, "kivi-4": 10304}
    for preset, bits in ((preset, 8 * n / 16384) for preset, n in nbytes.items()):
        cache = MixKVQCache(preset)
        generate(tiny("llama", head_dim=64), prompts([300]), cache, 2)
        assert cache.report().true_bits == bits


@pytest.mark.parametrize(
    "family",
    [
        "gemma2",
        "gpt_oss",
        "mistral",
        "bloom",
        "deepseek_v3",
        pytest.param("qwen3_next", marks=needs_linear),
        "phi3",
    ],
)
def test_bytes_of_every_kind_of_layer(family):
    """Sliding windows, linear states, native and decoded layers, fused projections: all that is held is counted."""
    attention = "eager" if family in ("gemma2", "gpt_oss", "bloom") else "sdpa"
    cache = lossless()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tokens in (5, 60, 40):
            forward(tiny(family, attention), cache, prompts([tokens])["input_ids"])
            report = cache.report()
            assert report.nbytes == held_bytes(cache) <= report.peak_nbytes


@pytest.mark.parametrize("steps", [0, 1, 40])
def test_bytes_while_nothing_is_packed(steps):
    cache = MixKVQCache()
    generate(tiny("phi3"), prompts([30, 12]), cache, steps + 1)
    report = cache.report()
    assert report.nbytes == held_bytes(cache) and report.true_bits == 0
    assert report.layers[0].path == "native" and report.layers[0].reason == "nothing packed yet: begins at 132 tokens"
    plain = 2 * 2 * 2 * 16 * (30 + steps) * 4 * 2
    assert plain <= report.nbytes <= plain + 2 * (2 * 2 * 16 * 8 + 4 * 8), "keys, values, query statistics, starts"


def test_the_peak_of_a_long_prompt_is_one_layer_in_full_precision():
    model, tokens = tiny("llama", num_hidden_layers=6, head_dim=32, num_key_value_heads=4), 4096
    cache = MixKVQCache()
    layer_bytes = 2 * 4 * tokens * 32 * 4
    alive = []

    def count(*_):
        """Storages of keys or values of the whole prompt that anybody holds after a layer has run."""
        storages = {}
        for thing in gc.get_objects():
            if type(thing) is torch.Tensor and thing.shape == (1, 4, tokens, 32):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        alive.append(sum(storages.values()))

    hooks = [layer.register_forward_hook(count) for layer in model.model.layers]
    try:
        forward(model, cache, prompts([tokens])["input_ids"], logits_to_keep=1)
    finally:
        for h in hooks:
            h.remove()
    report = cache.report()
    assert alive == [0] * 6, "after its attention no layer leaves keys or values behind"
    staging = SLAB_COLUMNS * 4 * codec(cache.layers[0].store.codec).record_bound
    assert report.peak_nbytes <= report.nbytes + layer_bytes + staging
    assert report.nbytes < layer_bytes, "six packed layers are smaller than one in full precision"


def test_decoding_holds_hardly_more_than_what_it_keeps():
    """At 32k tokens: buffers, tables and what packing needs on the way are small beside the records."""
    cache, generator = MixKVQCache(), torch.Generator().manual_seed(0)
    module, layers = Module(), 3

    def step(n):
        for index in range(layers):
            query, key, value = (
                torch.randn(1, heads, m, 16, generator=generator) for heads, m in ((4, 1), (2, n), (2, n))
            )
            given = cache.update(key, value, index)
            found(attention)(module, query, *given, None, scaling=0.25)

    step(32768)
    prompt = cache.report()
    assert prompt.peak_nbytes >= prompt.nbytes + 2 * 2 * 32768 * 16 * 4, "one layer in full precision"
    cache.reset_peak()
    assert cache.report().peak_nbytes == prompt.nbytes
    for _ in range(300):
        step(1)
    report = cache.report()
    assert [layer.store.blocks.item() for layer in cache.layers] == [(32768 + 300 - 4) // 128] * layers
    assert prompt.nbytes < report.nbytes == held_bytes(cache)
    staging = 2 * codec(cache.layers[0].store.codec).record_bound
    assert report.nbytes + staging <= report.peak_nbytes <= 1.1 * report.nbytes


def test_the_table():
    cache = used("default", {})
    lines = str(cache.report()).splitlines()
    assert " ".join(lines[0].split()) == "layer path tokens bytes true bits codes metadata overhead decoded"
    assert lines[1].split()[:3] == ["0", "packed", "702"]
    assert lines[3].startswith("preset default: ") and "true bits" in lines[3] and "bytes, at most" in lines[3]
    assert re.fullmatch(r"layers 0-1 packed: .*sdpa_attention_forward proved .* -> nothing to do", lines[4])
    assert len(lines) == 5 and max(map(len, lines)) <= 120


def test_raised_scales_are_counted():
    """A channel far from zero with a tiny spread: the offset does not fit the scale."""
    key = torch.randn(1, 2, 300, 16) * 1e-3 + 50
    cache = MixKVQCache(key_reference="none")
    cache.update(key, torch.randn(1, 2, 300, 16), 0)
    with pytest.warns(UserWarning):
        for _ in range(2):
            cache.update(key[:, :, :1], key[:, :, :1], 0)
    report = cache.report()
    assert report.layers[0].raised_scales > 0 and "raised scales:" in str(report)


def test_one_warning_per_cache():
    cache = lossless()
    with pytest.warns(UserWarning, match="AttentionInterface") as caught:
        generate(tiny("bloom", "eager"), prompts([60]), cache, 5)
    assert len(caught) == 1 and "cache.report()" in str(caught[0].message)
    assert all(layer.dequantizations == 3 for layer in cache.report().layers)
    assert all("AttentionInterface" in layer.reason for layer in cache.report().layers)


def test_what_is_packed_by_an_update_is_in_the_accounts():
    """Where no attention ran since the last tokens, such as in a cache that is filled by hand."""
    cache, states = packed_layer().cache, torch.zeros(2, 1, HEADS, 1, DIM)
    while cache.layers[0].store.exact < 32:
        cache.update(*states, 0)
    cache.reset_peak()
    cache.update(*states, 0)
    report = cache.report()
    assert cache.ledger.total == report.nbytes == held_bytes(cache)
    assert report.peak_nbytes >= report.nbytes + codec(cache.layers[0].store.codec).record_bound, (
        "with what packing needs"
    )
