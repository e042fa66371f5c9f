"""Batches of prompts with a fresh cache each: answers, what is refused, and bytes known beforehand."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cli_fixtures import WORDS, save_tiny_model
from eval_fixtures import END, byte_model, save_byte_model
from transformers import AutoModelForCausalLM

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.integrations.batches import BatchGenerator, BatchSettings, weight_bytes

LONG = " ".join(WORDS * 20)  # 1340 bytes: several blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("bytes")))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("words")))


def alone(prompt: str, new: int) -> tuple[str, int, int]:
    """Text, tokens and bytes of the cache, by hand."""
    model, tokenizer = byte_model()
    inputs = tokenizer(prompt, return_tensors="pt")
    cache = MixKVQCache()
    out = model.generate(**inputs, **cache_argument(cache), max_new_tokens=new, do_sample=False)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids), cache.report().nbytes


def test_rows_do_not_depend_on_their_batch(folder: str) -> None:
    generator = BatchGenerator(BatchSettings(folder, max_new_tokens=60))
    prompts = ["a", LONG, "the cat sat", LONG[:300]]
    encoded = generator.encode(prompts)
    together, _ = generator.answer(encoded)
    for prompt, answer in zip(prompts, together, strict=True):
        text, new, nbytes = alone(prompt, 60)
        single, held = generator.answer(generator.encode([prompt]))
        assert (answer.text, answer.new_tokens, answer.prompt_tokens) == (text, new, len(prompt))
        assert single == [answer] and held == nbytes


@pytest.mark.parametrize("several", [list, tuple])
def test_tokens_end_with_the_end_token(folder: str, several: type) -> None:
    """A token that the model says early in one answer is declared to end texts."""
    model, tokenizer = byte_model()
    prompts, said = ["the cat", "dog", "mat and", "big red", "blue", "it was on the"], []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
        said.append(out[0, ids.shape[1] :].tolist())
    end = next(token for token in said[0][5:] if any(token not in other for other in said))
    lengths = [ids.index(end) + 1 if end in ids else 60 for ids in said]
    assert min(lengths) < 60 == max(lengths)
    options = {"eos_token_id": several([END, end])}
    generator = BatchGenerator(BatchSettings(folder, max_new_tokens=60, generate_options=options))
    answers, _ = generator.answer(generator.encode(prompts))
    assert [answer.new_tokens for answer in answers] == lengths
    assert [a.text for a in answers] == [tokenizer.decode(s[:n]) for s, n in zip(said, lengths, strict=True)]


def test_sampling_depends_on_seed_and_prompts_alone(words: str) -> None:
    def texts(seed: int) -> list[str]:
        settings = BatchSettings(
            words, max_new_tokens=20, seed=seed, generate_options={"do_sample": True, "temperature": 2.0}
        )
        generator = BatchGenerator(settings)
        torch.rand(seed + 1)  # whatever was drawn before
        return [answer.text for answer in generator.answer(generator.encode(["the cat", "a dog ran"]))[0]]

    assert texts(1) == texts(1) != texts(2)


def test_chat_template(words: str) -> None:
    generator = BatchGenerator(BatchSettings(words, apply_chat_template=True))
    (ids,) = generator.encode(["the cat"])
    assert generator.tokenizer.decode(ids) == "user the cat <end> assistant"


def test_cache_options_reach_the_cache(folder: str) -> None:
    sizes = []
    for preset, options in (("default", {}), ("default", {"value_bits": 4}), ("lossless", {})):
        generator = BatchGenerator(BatchSettings(folder, preset, max_new_tokens=2, cache_options=options))
        sizes.append(generator.answer(generator.encode([LONG]))[1])
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "is a NoneType, must be a string"),
        (7, "is a int, must be a string"),
        ("", "is empty, must have at least one token"),
        ("x" * 11, "has 11 tokens, must have at most 10"),
    ],
)
def test_wrong_prompts(folder: str, prompt: Any, message: str) -> None:
    generator = BatchGenerator(BatchSettings(folder, max_prompt_tokens=10))
    assert generator.encode(["x" * 10, prompt])[1] == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "model is '', must be a folder"),
        ({"dtype": "int8"}, "dtype is 'int8', must be one of auto"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, must be an int of at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens is True, must be an int"),
        ({"max_prompt_tokens": 1.5}, "max_prompt_tokens is 1.5, must be an int"),
        ({"generate_options": {"past_key_values": None}}, "generate_options has past_key_values, must leave"),
        ({"generate_options": {"generation_config": None}}, "generate_options has generation_config, must leave"),
        ({"cache_options": {"config": None}}, "cache_options must leave config"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        BatchSettings(**{"model": "m", **fields})


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"model is {str(tmp_path)!r}, must be a folder with config.json")):
        BatchSettings(str(tmp_path)).model_config()


@pytest.mark.parametrize(("prompt", "new", "limit"), [(None, 256, 3840), (100, 256, 100), (3840, 256, 3840)])
def test_prompt_limit(folder: str, prompt: int | None, new: int, limit: int) -> None:
    settings = BatchSettings(folder, max_prompt_tokens=prompt, max_new_tokens=new)
    assert settings.prompt_limit(settings.model_config()) == limit


@pytest.mark.parametrize(("prompt", "new"), [(None, 4096), (3841, 256)])
def test_more_than_the_positions(folder: str, prompt: int | None, new: int) -> None:
    settings = BatchSettings(folder, max_prompt_tokens=prompt, max_new_tokens=new)
    with pytest.raises(ValueError, match="must be at most 4096, the positions of the model"):
        settings.prompt_limit(settings.model_config())


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_weight_bytes_are_those_of_the_loaded_model(folder: str, dtype: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    loaded = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert weight_bytes(BatchSettings(folder).model_config(), dtype) == loaded
