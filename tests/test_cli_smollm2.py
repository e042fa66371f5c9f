"""SmolLM2 from the wheel: lossless equals DynamicCache, greedy, over a prompt of several blocks."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("gguf")

from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.cli import CliError
from mixkvq.cli.models import load, require_smollm2
from mixkvq.cli.text import question_ids


@pytest.mark.slow
def test_lossless_equals_dynamic_cache() -> None:
    try:
        require_smollm2()
    except CliError as error:
        pytest.skip(str(error))
    model, tokenizer = load()
    ids = question_ids(tokenizer, 600)
    answers = []
    for cache in (DynamicCache(config=model.config), MixKVQCache("lossless")):
        with torch.inference_mode():
            out = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    assert answers[0] == answers[1]
    assert cache.report().layers[0].path == "packed"
    assert "pdb" in tokenizer.decode(answers[0])
