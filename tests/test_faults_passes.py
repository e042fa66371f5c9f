"""What is no broken pass: layers that hold an image, threads that have ended, layers that a caller shortens."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import torch
import transformers
from models import forward, lossless, prompts, relative_gap, tiny
from transformers import DynamicCache

from mixkvq import compat

IDS = prompts([140])["input_ids"]


@pytest.mark.parametrize("first", [20, 40])
def test_layers_that_hold_an_image_do_not_grow(first):
    """Also where the text has as many tokens as the image when it begins, and when it reaches that later."""
    config = transformers.MllamaConfig().text_config
    config = type(config)(
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    model, image = transformers.MllamaForCausalLM(config).eval(), torch.randn(1, 40, 64)

    def read(cache):
        logits = [forward(model, cache, IDS[:, :first] % 99, cross_attention_states=image)]
        logits += [forward(model, cache, IDS[:, i : i + 1] % 99) for i in range(first, 60)]
        return torch.cat(logits, 1)

    cache = lossless()
    torch.testing.assert_close(read(cache), read(DynamicCache()), rtol=0, atol=1e-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 40, 60, 40]


def broken_off(model, cache, n: int) -> None:
    """A pass over n tokens that ends at the third layer."""

    def fail(*_):
        raise MemoryError

    handle = model.model.layers[2].register_forward_pre_hook(fail)
    try:
        with pytest.raises(MemoryError):
            forward(model, cache, IDS[:, 100 : 100 + n])
    finally:
        handle.remove()


def test_what_a_thread_that_has_ended_left_can_be_undone_in_another():
    model, cache = tiny(num_hidden_layers=4), lossless()
    forward(model, cache, IDS[:, :100])
    want = copy.deepcopy(cache)
    thread = Thread(target=broken_off, args=(model, cache, 3))
    thread.start()
    thread.join()
    back = -3 if compat.VERSION >= (5, 14) else 100  # older ones take the length to keep
    with pytest.raises(
        RuntimeError, match=rf"broke off: layer 0 has 103 tokens, layer 2 has 100. cache.crop\({back}\)"
    ):
        forward(model, cache, IDS[:, 100:101])
    cache.crop(back)
    assert torch.equal(forward(model, cache, IDS[:, 100:101]), forward(model, want, IDS[:, 100:101]))


def test_a_thread_that_added_nothing_holds_nothing():
    model, cache = tiny(num_hidden_layers=4), lossless()
    forward(model, cache, IDS[:, :100])
    thread = Thread(target=cache.get_mask_sizes, args=(1, 0))
    thread.start()
    thread.join()
    for other in (*cache.fork(1), copy.deepcopy(cache), cache):
        other.crop(-10)
        other.reorder_cache(torch.tensor([0]))
        assert forward(model, other, IDS[:, 90:91]).isfinite().all()


def test_layers_that_a_caller_shortens_are_on_their_own():
    model, cache = tiny(num_hidden_layers=4), lossless()
    forward(model, cache, IDS[:, :100])
    forward(model, cache, IDS[:, 100:101])
    for layer in cache.layers[:2]:
        layer.crop(-10)
    assert cache.half_done() is None
    for at in (101, 102):
        cache.get_mask_sizes(1, 0)
        for index in range(4):
            cache.update(*torch.zeros(2, 1, model.config.num_key_value_heads, 1, model.config.head_dim), index)
        assert [layer.length for layer in cache.layers] == [at - 9, at - 9, at + 1, at + 1]


def test_an_interrupted_rollback_is_whole():
    """`crop` under assisted decoding packs once all layers are cropped: that moves the window and cannot be undone."""
    model, cache = tiny(num_hidden_layers=4), lossless(precision="exact")
    cache.activate_past_recording()
    forward(model, cache, IDS[:, :100])
    for at in range(100, 135):
        forward(model, cache, IDS[:, at : at + 1])
    want = copy.deepcopy(cache)
    want.crop(-1)
    pack = cache.layers[1].pack

    def interrupted():
        pack()
        raise KeyboardInterrupt

    cache.layers[1].pack = interrupted
    with pytest.raises(KeyboardInterrupt):
        cache.crop(-1)
    del cache.layers[1].pack
    assert relative_gap(forward(model, cache, IDS[:, 134:135]), forward(model, want, IDS[:, 134:135])) < 1e-5
