"""A real model: SmolLM2-135M-Instruct from its wheel, on the documentation that every Python has.

``-m exhaustive`` runs the lossless grid, 200 tokens each. Skipped where the wheel or what loads it is absent.
"""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import os
from functools import lru_cache

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
from models import assert_same_tokens, generate, lossless
from one_layer import Module, attention
from transformers import DynamicCache

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.cli import UserError
from mixkvq.cli.score import teacher_forced
from mixkvq.cli.text import question_ids, text_ids
from mixkvq.compat import attention_function, cache_argument
from mixkvq.eval.checkpoints import SMOLLM2
from mixkvq.eval.memory import bf16_nbytes, cache_nbytes
from mixkvq.eval.models import load

pytestmark = pytest.mark.slow
GRID = [(length, beams, block) for length in (1, 100, 128, 129, 1000) for beams in (1, 4) for block in (32, 128)]


@pytest.fixture(scope="module")
def smollm2():
    try:
        SMOLLM2.require()
    except UserError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield _load()
    torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _load():
    return load()


def batch(tokenizer, length: int) -> dict[str, torch.Tensor]:
    """Three stretches of text, two of them padded on the left (if longer than one token)."""
    text, lengths = text_ids(tokenizer, 2100), [length, -(-length // 2), max(length - 97, 1)]
    ids, mask = torch.zeros(3, length, dtype=torch.int64), torch.zeros(3, length, dtype=torch.int64)
    for row, n in enumerate(lengths):
        ids[row, length - n :] = torch.tensor(text[300 * row : 300 * row + n])
        mask[row, length - n :] = 1
    return {"input_ids": ids, "attention_mask": mask}


@lru_cache(maxsize=1)
def expected(length: int, beams: int):
    model, tokenizer = _load()
    return run(model, tokenizer, length, DynamicCache(), beams)


def run(model, tokenizer, length, cache, beams):
    with torch.inference_mode():
        return generate(model, batch(tokenizer, length), cache, 200, num_beams=beams, min_new_tokens=200)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("length", "beams", "block"), GRID)
def test_lossless_gives_the_same_tokens(smollm2, length, block, beams):
    model, tokenizer = smollm2
    cache = lossless(block)
    got = run(model, tokenizer, length, cache, beams)
    assert_same_tokens(expected(length, beams), got)
    report = cache.report()
    assert {layer.path for layer in report.layers} == {"packed"} and all(not x.dequantizations for x in report.layers)


def test_lossless_answers_a_question_as_dynamic_cache_does(smollm2):
    model, tokenizer = smollm2
    ids = question_ids(tokenizer, 600)
    answers = []
    for cache in (DynamicCache(config=model.config), MixKVQCache("lossless")):
        with torch.inference_mode():
            out = model.generate(ids, **cache_argument(cache), max_new_tokens=30, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    assert answers[0] == answers[1]
    assert cache.report().layers[0].path == "packed"
    assert "pdb" in tokenizer.decode(answers[0])


def test_default_preset_keeps_the_models_predictions(smollm2):
    """The protocol of `mixkvq demo`, shorter: 1536 tokens read at once, then 512 teacher-forced."""
    model, tokenizer = smollm2
    config, cache = MixKVQConfig.preset("default"), MixKVQCache()
    ids = torch.tensor([text_ids(tokenizer, 2048)])
    exact = DynamicCache()
    score = teacher_forced(model, ids, 1536, exact, cache, config.sink_length, config.block_length, lambda *event: None)
    assert len(score.kl) == 512
    assert 0 < score.mean_kl() <= 0.012
    assert score.agreement() >= 0.94
    assert cache.report().true_bits <= 3.29


def test_default_preset_takes_a_quarter_of_a_bf16_cache(smollm2):
    """At the length of `mixkvq demo`, with the shapes of the model; one layer at a time is held exactly."""
    model, _ = smollm2
    tokens, cache = 5300, MixKVQCache()
    config = model.config
    shape = (1, config.num_key_value_heads, tokens, config.hidden_size // config.num_attention_heads)
    generator = torch.Generator().manual_seed(0)
    attend = attention_function("sdpa", attention)
    module, groups = Module(), config.num_attention_heads // config.num_key_value_heads
    module.num_key_value_groups = groups
    for index in range(config.num_hidden_layers):
        keys, values = cache.update(*(torch.randn(shape, generator=generator) for _ in range(2)), index)
        query = torch.randn(1, shape[1] * groups, 1, shape[3], generator=generator)
        attend(module, query, keys, values, None, scaling=shape[3] ** -0.5)  # of the last token: a layer packs then
    report = cache.report()
    one_layer = 2 * 4 * shape[1] * tokens * shape[3]
    assert report.nbytes <= 0.27 * bf16_nbytes(config, tokens) and report.nbytes == cache_nbytes(cache)
    assert report.peak_nbytes <= report.nbytes + one_layer + (8 << 20)
