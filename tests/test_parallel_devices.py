"""`device_map`: the storage of a layer is where its keys and values are, and weights may be elsewhere until needed."""

from __future__ import annotations

import copy

import pytest
import torch
from models import assert_same_tokens, forward, generate, lossless, paths, prompts, tiny

from mixkvq import MixKVQCache
from mixkvq.report import tensors_in

SHORT = {"block_length": 32, "residual_length": 32, "key_group_size": 32}


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_a_dispatched_model(tmp_path, second):
    """accelerate moves weights and inputs from device to device between modules; the cache sees none of it."""
    accelerate = pytest.importorskip("accelerate")
    model, inputs = tiny("llama"), prompts([150, 110])
    modules = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = {**dict.fromkeys(modules, "cpu"), "model.layers.1": second}
    given = {"offload_dir": tmp_path} if second == "disk" else {}
    spread = accelerate.dispatch_model(
        copy.deepcopy(model), device_map=places, main_device="cpu", force_hooks=True, **given
    )
    assert (spread.model.layers[1].self_attn.k_proj.weight.device.type == "meta") == (second == "disk")
    for make in (lossless, lambda: MixKVQCache(**SHORT)):
        caches = make(), make()
        want, got = (generate(m, inputs, cache, 40) for m, cache in zip((model, spread), caches, strict=True))
        assert_same_tokens(want, got)
        assert torch.equal(torch.stack(want.logits), torch.stack(got.logits))
        assert paths(caches[1]) == ["packed", "packed"]
        assert {t.device.type for layer in caches[1].layers for t in layer.tensors()} == {"cpu"}
        assert caches[1].report().nbytes == caches[0].report().nbytes


def test_layers_on_two_devices():
    """The second device has no data to look at; that every tensor of a layer stays on it can be seen all the same."""
    cache, generator = MixKVQCache(**SHORT), torch.Generator().manual_seed(0)
    devices = ["cpu", "meta"]

    def step(batch: int, tokens: int) -> None:
        for index, device in enumerate(devices):
            states = (torch.randn(batch, 2, tokens, 32, generator=generator).to(device) for _ in "kv")
            keys, values = cache.update(*states, index)
            assert keys.device.type == values.device.type == device and keys.shape[2] == cache.layers[index].length

    def check(batch: int, tokens: int) -> None:
        for layer, device in zip(cache.layers, devices, strict=True):
            held = [*layer.tensors(), *tensors_in(vars(layer))]
            assert held and {t.device.type for t in held} == {device}
            assert layer.device.type == device and layer.length == tokens
            assert len(layer.states[0]) == batch

    step(3, 150)
    check(3, 150)
    step(3, 1)
    cache.batch_repeat_interleave(2)
    check(6, 151)
    cache.crop(-40)
    check(6, 111)
    copied = copy.deepcopy(cache)
    assert [layer.states[0].device.type for layer in copied.layers] == devices
    assert [layer.tokens for layer in cache.report().layers] == [111, 111]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_layer_stays_on_the_device_of_its_first_tokens():
    cache = MixKVQCache()
    states = torch.zeros(1, 2, 3, 32)
    cache.update(states, states, 0)
    with pytest.raises(ValueError, match="key_states is on meta, must be on cpu as the tokens cached before"):
        cache.update(states.to("meta"), states.to("meta"), 0)
    assert cache.get_seq_length() == 3


@pytest.mark.parametrize("preset", ["default", "paper", "lossless"])
def test_nothing_lands_on_the_default_device(preset):
    """Where a tensor is made without a device it would be on this one, which holds no data."""
    model, inputs, wide = tiny("llama"), prompts([150, 110]), torch.ones(2, 1, dtype=torch.long)
    results = []
    for device in ("cpu", "meta"):
        cache, mask = MixKVQCache(preset, **SHORT), inputs["attention_mask"]
        token, beams = torch.full((2, 1), 5), torch.tensor([1, 0])
        with torch.device(device):
            logits = [forward(model, cache, inputs["input_ids"], mask)]
            for _ in range(40):
                mask = torch.cat([mask, wide], 1)
                logits.append(forward(model, cache, token, mask))
            cache.reorder_cache(beams)
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices([0, 2])
            cache.crop(-50)
            mask = mask.flip(0)[:, :-49]
            logits.append(forward(model, cache, token, mask))
            decoded = [tensor for layer in cache.layers for tensor in layer.decode()]
            assert cache.report().nbytes > 0 and len(copy.deepcopy(cache)) == 2
        assert paths(cache) == ["packed", "packed"]
        assert {t.device.type for layer in cache.layers for t in layer.tensors()} == {"cpu"}
        results.append([*logits, *decoded])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
