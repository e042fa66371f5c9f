"""`MixKVQCache` on a CUDA device: what a model gets, streams, graphs, files, offloading, memory. Skipped without one.

``MIXKVQ_TEST_DEVICE=cpu`` rehearses what needs no CUDA on CPU tensors, which then go the way of CUDA tensors.
"""

from __future__ import annotations

import copy
import os
import warnings

import pytest
import torch
from models import assert_same_tokens, forward, generate, paths, prompts, relative_gap, tiny
from transformers import DynamicCache

from mixkvq import MixKVQCache, operators, ops, torch_module
from mixkvq.compat import cache_argument

DEVICE = os.environ.get("MIXKVQ_TEST_DEVICE") or "cuda"
ON_GPU = DEVICE.startswith("cuda")
pytestmark = pytest.mark.skipif(
    ON_GPU and (torch_module.CUDA_PROBLEM is not None or not torch.cuda.is_available()),
    reason=f"no CUDA device, or no kernels: {torch_module.CUDA_PROBLEM}",
)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="rehearsed on the CPU")
BLOCK = {"block_length": 32, "residual_length": 32}


@pytest.fixture(autouse=True)
def rehearsal(monkeypatch):
    monkeypatch.setattr(operators, "rehearsing", not ON_GPU)


def model_on(device: str, dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa", **changes):
    """A small Llama with heads of 64 channels."""
    fields = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, **changes}
    model = tiny("llama", attention, dtype, **fields)
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def cache(preset: str = "default", **options) -> MixKVQCache:
    coded = {} if preset == "lossless" else {"key_group_size": 32}
    return MixKVQCache(preset, **BLOCK, **coded, **options)


def on(device: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def all_records(used: MixKVQCache) -> list[list[bytes]]:
    return [list(layer.store.records.records()) for layer in used.layers]


# ---- results -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[150], [150, 110, 77]])
def test_lossless_generates_what_the_dynamic_cache_does(attention, lengths):
    model, inputs = model_on(DEVICE, torch.float32, attention), on(DEVICE, prompts(lengths))
    want = generate(model, inputs, DynamicCache(), 70)
    got = generate(model, inputs, used := cache("lossless"), 70)
    assert_same_tokens(want, got, 1e-4)
    assert set(paths(used)) == {"packed"}
    assert all(layer.dequantizations == 0 for layer in used.layers)
    assert all(layer.store.k.device.type == torch.device(DEVICE).type for layer in used.layers)


@pytest.mark.parametrize("preset", ["default", "lossless"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_cache_on_the_cpu(preset, dtype):
    """Each packs what its own model gave, which is not the same in bits: test_gpu_kernels.py compares records."""
    here, there = model_on("cpu", dtype), model_on(DEVICE, dtype)
    inputs, token = prompts([150, 110]), torch.tensor([[5], [7]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    logits = []
    for model, device in ((here, "cpu"), (there, DEVICE)):
        used = cache(preset, precision="exact")
        forward(model, used, **_ids(on(device, inputs)))
        logits.append(forward(model, used, token.to(device), mask.to(device)).float().cpu())
    assert relative_gap(*logits) < (1e-3 if dtype == torch.float32 else 0.1)


def _ids(inputs):
    return {"ids": inputs["input_ids"], "mask": inputs["attention_mask"]}


# ---- files ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source, target", [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
def test_saved_on_one_device_and_loaded_on_another(tmp_path, source, target):
    inputs, token = prompts([150, 110]), torch.tensor([[5], [7]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    used = cache(precision="exact")
    model = model_on(source)
    forward(model, used, **_ids(on(source, inputs)))
    used.save(tmp_path / "one")
    loaded = MixKVQCache.load(tmp_path / "one", config=model.config, device=target)
    assert all_records(loaded) == all_records(used)
    loaded.save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    want = forward(model, used, token.to(source), mask.to(source)).float().cpu()
    got = forward(model_on(target), loaded, token.to(target), mask.to(target)).float().cpu()
    assert relative_gap(got, want) < 0.1
    assert set(paths(loaded)) == {"packed"}


def test_forks_copies_and_moved_rows_go_on():
    model, inputs, token = model_on(DEVICE), on(DEVICE, prompts([150, 110])), torch.tensor([[5], [7]]).to(DEVICE)
    mask = torch.cat([inputs["attention_mask"], inputs["attention_mask"].new_ones(2, 1)], 1)
    used = cache()
    forward(model, used, **_ids(inputs))
    (fork,), copied, turned = used.fork(1), copy.deepcopy(used), copy.deepcopy(used)
    turned.reorder_cache(torch.tensor([1, 0]).to(DEVICE))
    want = forward(model, used, token, mask)
    assert torch.equal(forward(model, fork, token, mask), want)
    assert torch.equal(forward(model, copied, token, mask), want)
    assert relative_gap(forward(model, turned, token.flip(0), mask.flip(0)).flip(0).float(), want.float()) < 0.05


@pytest.mark.parametrize("keep", [140, 100, 60, 20])
def test_crop_and_read(keep):
    model, inputs = model_on(DEVICE), on(DEVICE, prompts([150]))
    used = cache("lossless")
    forward(model, used, **_ids(inputs))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in used.layers]
    used.crop(keep - 150)
    for layer, (k, v) in zip(used.layers, before, strict=True):
        assert torch.equal(layer.keys, k[:, :, :keep]) and torch.equal(layer.values, v[:, :, :keep])
    forward(model, used, inputs["input_ids"][:, keep:], inputs["attention_mask"])
    assert used.get_seq_length() == 150


# ---- decode steps --------------------------------------------------------------------------------------------------
def steady(model, used, inputs, steps: int) -> None:
    """Steps until no flush is near."""
    mask = inputs["attention_mask"]
    for _ in range(steps):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        forward(model, used, mask.new_full((len(mask), 1), 5), mask)
    inputs["attention_mask"] = mask


@needs_gpu
@pytest.mark.parametrize("lengths", [[150], [150, 110]])
def test_a_step_neither_waits_nor_allocates(lengths):
    """Append and attention of every layer, between two flushes."""
    model, inputs, used = model_on(DEVICE), on(DEVICE, prompts(lengths)), cache()
    forward(model, used, **_ids(inputs))
    steady(model, used, inputs, 4)
    made, real = [], {"update": MixKVQCache.update, "attend": type(used.layers[0]).attend}

    def watched(name):
        def call(owner, *args, **kwargs):
            before = torch.cuda.memory_stats()["allocation.all.allocated"]
            torch.cuda.set_sync_debug_mode("error")
            try:
                return real[name](owner, *args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                made.append((name, torch.cuda.memory_stats()["allocation.all.allocated"] - before))

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixKVQCache, "update", watched("update"))
        patch.setattr(type(used.layers[0]), "attend", watched("attend"))
        steady(model, used, inputs, min(layer.store._slack for layer in used.layers) - 1)
    assert len(made) >= 4 * len(used.layers)
    assert {n for name, n in made if name == "update"} == {0}
    assert {n for name, n in made if name == "attend"} == {1}, "the output"


@needs_gpu
def test_another_stream_gives_the_same():
    model, inputs = model_on(DEVICE), on(DEVICE, prompts([150, 110]))
    want = generate(model, inputs, cache(), 40)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = generate(model, inputs, cache(), 40)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(want.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))


@needs_gpu
def test_attention_over_a_table_with_room_in_a_graph():
    """Captured once, replayed while tokens and blocks come."""
    model, inputs, used = model_on(DEVICE), on(DEVICE, prompts([150, 110])), cache()
    forward(model, used, **_ids(inputs))
    store = used.layers[0].store
    t = store.core().tensors
    window = [x.clone() for x in (t.k, t.v, t.exact)]
    handle = ops.layer(
        *window, t.start, t.sink_length, t.slabs, store.place, store.blocks, t.mu, capacity=store.place.shape[2] + 3
    )
    q = torch.randn(2, 4, 1, 64, device=DEVICE, dtype=torch.bfloat16)
    ops.attend(handle, q)  # its workspace is made here
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend(handle, q)
    fewer = handle.tensors.blocks - 1
    for blocks, tokens in ((handle.tensors.blocks.clone(), 0), (fewer, 0), (handle.tensors.blocks.clone(), -3)):
        handle.tensors.blocks.copy_(blocks)
        window[2].add_(tokens)
        q.normal_()
        graph.replay()
        assert torch.equal(out, ops.attend(handle, q))


@needs_gpu
def test_a_graph_captured_without_a_first_call():
    layer = cache_layer()
    q, graph = torch.randn(1, 4, 1, 64, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attend(layer, q)
    for _ in range(3):
        q.normal_()
        graph.replay()
        assert torch.equal(out, ops.attend(cache_layer(), q))


def cache_layer():
    """A handle over 40 blocks of random tokens, float32."""
    from mixkvq.config import MixKVQConfig

    codec = MixKVQConfig.preset("default", key_reference="none").codec(64, "float32")
    k, v = torch.randn(2, 1, 2, 40 * 128, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    first, blocks = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor([40], device=DEVICE)
    staging, *_ = ops.pack(codec, k, v, first, blocks, 40)
    place = torch.arange(80).view(1, 2, 40) * staging.shape[-1]
    window = k[:, :, :9].clone(), v[:, :, :9].clone(), torch.tensor([9], device=DEVICE)
    return ops.layer(*window, None, 4, [staging.flatten()], place, blocks)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
def test_layers_on_two_devices():
    """As device_map spreads them: each layer's tensors are on its own device, its kernels in that device's stream."""
    model, inputs = model_on("cuda:0"), on("cuda:0", prompts([150, 110]))
    want = generate(model, inputs, cache(), 40)
    from accelerate import dispatch_model

    split = copy.deepcopy(model)
    names = {"model.embed_tokens": 0, "model.layers.0": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    split = dispatch_model(split, {**names, **{f"model.layers.{i}": 1 for i in range(1, len(model.model.layers))}})
    got = generate(split, inputs, used := cache(), 40)
    assert torch.equal(want.sequences, got.sequences)
    assert {layer.store.k.device.index for layer in used.layers} == {0, 1}


# ---- memory --------------------------------------------------------------------------------------------------------
@needs_gpu
def test_offloaded_records_give_the_same_and_are_on_the_host(tmp_path):
    model, inputs = model_on(DEVICE), on(DEVICE, prompts([150, 110]))
    want = generate(model, inputs, used := cache(), 70)
    got = generate(model, inputs, away := cache(offload=True), 70)
    assert torch.equal(want.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))
    slabs = [slab for layer in away.layers for slab in layer.store.records.slabs]
    assert slabs and all(slab.is_pinned() for slab in slabs)
    report = away.report()
    assert sum(layer.host_bytes for layer in report.layers) == sum(slab.numel() for slab in slabs)
    assert "host bytes: " in str(report) and "host bytes" not in str(used.report())
    away.save(tmp_path / "cache")
    loaded = MixKVQCache.load(tmp_path / "cache", config=model.config, device=DEVICE, offload=True)
    assert all_records(loaded) == all_records(away) == all_records(used)
    assert all(slab.is_pinned() for layer in copy.deepcopy(loaded).layers for slab in layer.store.records.slabs)


@needs_gpu
def test_a_prompt_needs_no_more_than_with_the_dynamic_cache():
    model = model_on(DEVICE, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8)
    ids = torch.randint(2, 90, (2, 2048), device=DEVICE)
    peaks = []
    for used in (DynamicCache(), MixKVQCache()):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            model.model(ids, **cache_argument(used), use_cache=True)
        peaks.append((torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()))
        del used
    assert peaks[1][0] <= peaks[0][0] and peaks[1][1] < peaks[0][1]


@needs_gpu
def test_plain_layers_become_packed_without_warnings():
    model, inputs = model_on(DEVICE), on(DEVICE, prompts([20, 11]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, inputs, used := cache(), 90)
    assert set(paths(used)) == {"packed"}
