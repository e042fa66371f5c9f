"""Versions of transformers: too old, newer than any tried, and what differs between those in between."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from models import forward, generate, lossless, paths, prompts, tiny
from transformers import DynamicCache

from mixkvq import MixKVQCache, compat


def python(version: str, code: str, *options: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, where transformers says that it is another version."""
    pretend = f"import transformers; transformers.__version__ = {version!r}\n"
    return subprocess.run([sys.executable, "-P", *options, "-c", pretend + code], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["MixKVQCache", "install"])
def test_an_old_version_is_refused(name):
    done = python("4.56.2", f"from mixkvq import {name}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: mixkvq needs transformers >= 4.57, and 4.56.2 is installed: pip install -U 'transformers>=5.8'"
    )


NEWER = """
from mixkvq import MixKVQCache
import torch, warnings
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3)
model = LlamaForCausalLM(config).eval()
ids = torch.arange(2, 92).view(1, -1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    caches = [MixKVQCache("lossless", block_length=32, residual_length=32) for _ in range(2)]
told = [str(w.message) for w in caught if "newer" in str(w.message)]
assert len(told) == 1 and "transformers 6.0.0.dev0 is newer than" in told[0], told
want, got = (
    model.generate(ids, attention_mask=torch.ones_like(ids), cache=cache, max_new_tokens=20, do_sample=False)
    for cache in (DynamicCache(), caches[0])
)
assert torch.equal(want, got)
assert [layer.path for layer in caches[0].report().layers] == ["packed", "packed"]
"""


@pytest.mark.skipif(compat.VERSION < (5, 24), reason="a newer version has the argument `cache`")
def test_a_version_that_says_it_is_newer_warns_once_and_works():
    done = python("6.0.0.dev0", NEWER)
    assert done.returncode == 0, done.stderr


def test_a_newer_version_warns_once(monkeypatch):
    monkeypatch.setattr(compat, "VERSION", (compat.NEWEST[0], compat.NEWEST[1] + 1))
    monkeypatch.setattr(compat, "_warned", False)
    with pytest.warns(UserWarning, match=r"newer than .* look for a newer mixkvq"):
        MixKVQCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = lossless()
        got = generate(tiny("llama"), prompts([60]), cache, 5)
    assert paths(cache) == ["packed", "packed"]
    assert torch.equal(got.sequences, generate(tiny("llama"), prompts([60]), DynamicCache(), 5).sequences)


def test_the_versions_tried_are_silent(monkeypatch):
    for version in (compat.OLDEST, compat.FULL, compat.NEWEST):
        monkeypatch.setattr(compat, "VERSION", version)
        monkeypatch.setattr(compat, "_warned", False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            MixKVQCache()


def test_both_names_of_the_argument():
    """The name of the version is silent; ``past_key_values``, as in older code, works too."""
    model, inputs = tiny("llama"), prompts([60])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = model.generate(**inputs, **compat.cache_argument(lossless()), max_new_tokens=5, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = lossless()
        got = model.generate(**inputs, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(want, got) and cache.get_seq_length() == 64


@pytest.mark.parametrize("argument", [-1000, -90, -5, 0, 7, 90, 1000])
def test_crop_means_what_it_means_to_the_stock_cache(argument):
    lengths = []
    for cache in (DynamicCache(), lossless()):
        forward(tiny("llama"), cache, prompts([90])["input_ids"])
        try:
            cache.crop(argument)
            lengths.append(cache.get_seq_length())
        except ValueError as error:
            assert argument > 0 and "negative" in str(error)
            lengths.append("error")
    assert lengths[0] == lengths[1]


def test_the_version_is_read():
    assert compat.OLDEST <= compat.VERSION == tuple(int(n) for n in transformers.__version__.split(".")[:2])
