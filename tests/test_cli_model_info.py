"""`mixkvq info --model`: what it says about models of many kinds, and about folders that are none."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers
from cli_fixtures import save_tiny_model
from families import FAMILIES
from models import tiny
from transformers import DynamicCache

from mixkvq.cli import UserError, main, model_info
from mixkvq.cli.model_info import ModelInfoOptions, inspect_model
from mixkvq.eval.memory import cache_nbytes
from mixkvq.shapes import model_class


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("llama"))


def printed(capsys, *arguments: str) -> str:
    assert main(["info", *arguments]) == 0
    return capsys.readouterr().out


def test_the_layers_and_the_closing_line(llama, capsys):
    text = printed(capsys, "--model", str(llama), "--tokens", "300")
    assert text.startswith(
        "LlamaForCausalLM in float32, sdpa attention, weights of the folder; 300 tokens of the Python"
    )
    assert re.search(r"layers 0-1 packed: sdpa\S+ proved .* -> nothing to do", text)
    last = text.splitlines()[-1]
    dense = 2 * 2 * 2 * 16 * 307 * 4
    assert last.startswith("2 of 2 layers packed: ") and f"for 307 tokens, DynamicCache {dense:,} in float32" in last


def test_json(llama, capsys):
    facts = json.loads(printed(capsys, "--model", str(llama), "--json", "--preset", "kivi-2", "--attn", "eager"))
    assert (facts["packed_layers"], facts["tokens"], facts["preset"], facts["attention"]) == (2, 519, "kivi-2", "eager")
    assert facts["dynamic_cache_nbytes"] == 2 * 2 * 2 * 16 * 519 * 4 > 2 * facts["nbytes"]
    for index, layer in enumerate(facts["layers"]):
        assert layer["index"] == index and layer["path"] == "packed" and layer["remedy"] == "nothing to do"
        assert "eager_attention_forward" in layer["reason"] and layer["dequantizations"] == 0
        assert layer["decoded_for"] is None and 0 < layer["true_bits"] < 6
    assert facts["summary"].startswith("2 of 2 layers packed: ")


def test_bytes_are_those_of_the_caches(llama):
    found = inspect_model(ModelInfoOptions(str(llama), tokens=200))
    model, stock = transformers.AutoModelForCausalLM.from_pretrained(llama), DynamicCache()
    ids = torch.ones(1, 207, dtype=torch.int64)
    with torch.no_grad():
        model(ids, **model_info.cache_argument(stock))
    assert found.stock_nbytes == cache_nbytes(stock) and found.tokens == 207
    assert found.report.nbytes == sum(layer.nbytes for layer in found.report.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_a_configuration_without_weights(tmp_path, dtype, capsys):
    tiny("llama").config.save_pretrained(tmp_path)
    text = printed(capsys, "--model", str(tmp_path), "--dtype", dtype)
    name = "float32" if dtype == "auto" else dtype
    assert f"in {name}, sdpa attention, RANDOM weights (the folder has none); 512 random tokens (no tokenizer" in text
    assert text.splitlines()[-1].startswith("2 of 2 layers packed: ")


@pytest.mark.parametrize(
    "family, summary, words",
    [
        ("gemma2", "1 of 2 layers packed (1 native)", "at most 48 tokens are kept"),
        ("bloom", "0 of 2 layers packed (2 dequantized)", "does not pass through transformers' AttentionInterface"),
        ("deepseek_v3", "0 of 2 layers packed (2 native)", "latent (MLA)"),
        ("deepseek_v4", "0 of 2 layers packed (2 native)", "DeepseekV4HCACache: at most 48 tokens"),
        ("mamba", "0 of 2 layers packed (2 native)", "a state that does not grow"),
        ("mistral", "0 of 2 layers packed (2 native)", "DynamicSlidingWindowLayer"),
    ],
)
def test_other_families(tmp_path, capsys, family, summary, words):
    if reason := FAMILIES[family].absent("eager"):
        pytest.skip(reason)
    tiny(family, "eager").config.save_pretrained(tmp_path)
    text = printed(capsys, "--model", str(tmp_path), "--attn", "eager")
    assert text.splitlines()[-1].startswith(f"{summary}: ")
    assert ("records at" in text) == ("(2 native)" not in summary)
    line = next(line for line in text.splitlines() if words in line)
    assert line.startswith("layer") and " -> " in line


def test_an_encoder_and_a_decoder(tmp_path, capsys):
    sizes = {"d_model": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 97}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    transformers.BartForConditionalGeneration(
        transformers.BartConfig(**sizes, **layers, **tokens, forced_eos_token_id=None, max_position_embeddings=400)
    ).save_pretrained(tmp_path)
    text = printed(capsys, "--model", str(tmp_path))
    assert "BartForConditionalGeneration" in text and "392 random tokens" in text
    assert text.splitlines()[-1].startswith("2 of 2 layers packed: ")


@pytest.mark.parametrize(
    "family, summary",
    [
        *((name, "2 of 2 layers packed: ") for name in ("idefics3", "internvl", "paligemma", "qwen2_vl", "qwen3_vl")),
        ("mistral3", "0 of 2 layers packed (2 native): "),
        ("led", "0 of 2 layers packed"),  # too short: its decoder has 128 positions
        ("whisper", "2 of 2 layers packed: "),
        ("moonshine", "2 of 2 layers packed: "),
    ],
)
def test_models_that_see_or_hear(tmp_path, capsys, family, summary):
    attention = FAMILIES[family].attention[0]
    if reason := FAMILIES[family].absent(attention):
        pytest.skip(reason)
    tiny(family, attention).config.save_pretrained(tmp_path)
    text = printed(capsys, "--model", str(tmp_path))
    assert text.startswith(f"{FAMILIES[family].model} in float32")
    assert text.splitlines()[-1].startswith(summary)
    assert (", after noise for the encoder;" in text) == (family in ("whisper", "moonshine"))


@pytest.mark.parametrize(
    "config, auto",
    [
        ("LlavaConfig", "AutoModelForImageTextToText"),
        ("LlamaConfig", "AutoModelForCausalLM"),
        ("T5Config", "AutoModelForSeq2SeqLM"),
        ("WhisperConfig", "AutoModelForSpeechSeq2Seq"),
        ("ViTConfig", "AutoModelForCausalLM"),
    ],
)
def test_the_class_that_continues_text(config, auto):
    assert model_class(getattr(transformers, config)()).__name__ == auto


@pytest.mark.parametrize("weights", [True, False])
def test_a_class_that_only_the_folder_names(tmp_path, capsys, weights):
    """No auto class makes a model of the language part of Emu3."""
    tiny("emu3").save_pretrained(tmp_path)
    if not weights:
        (tmp_path / "model.safetensors").unlink()
    text = printed(capsys, "--model", str(tmp_path))
    assert text.startswith("Emu3ForCausalLM in float32") and ("RANDOM weights" in text) != weights
    assert text.splitlines()[-1].startswith("2 of 2 layers packed: ")


def test_too_short_a_text_says_where_packing_begins(llama, capsys):
    text = printed(capsys, "--model", str(llama), "--tokens", "100")
    assert "layers 0-1 native: nothing packed yet: begins at 132 tokens -> nothing to do" in text


# ---- errors --------------------------------------------------------------------------------------------------------
def refused(**options) -> str:
    with pytest.raises(UserError) as caught:
        inspect_model(ModelInfoOptions(**options))
    return str(caught.value)


def test_what_is_no_model(tmp_path, llama):
    assert "--model is '/nowhere/at/all', must be" in refused(model="/nowhere/at/all")
    assert "has no config.json" in refused(model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "must be a folder with a language model that transformers knows" in refused(model=str(tmp_path))
    transformers.ViTConfig().save_pretrained(tmp_path)
    assert "must be a folder with a language model" in refused(model=str(tmp_path))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 0}, "--tokens is 0, must be at least 1"),
        ({"tokens": 4090}, "--tokens is 4090, must be at most 4088: the model has 4096 positions"),
        ({"preset": "none"}, "--preset: "),
        ({"dtype": "int4"}, "--dtype is 'int4', must be one of auto, float32, float16, bfloat16"),
        ({"attn": "sideways"}, "--attn is 'sideways': "),
    ],
)
def test_wrong_options(llama, options, message):
    assert message in refused(model=str(llama), **options)


@pytest.mark.parametrize("positions", [1, 8])
def test_too_few_positions(tmp_path, positions):
    tiny("llama", max_position_embeddings=positions).config.save_pretrained(tmp_path)
    message = f"a model with {positions} positions, must have more than the 8 that are decoded"
    assert message in refused(model=str(tmp_path)) and message in refused(model=str(tmp_path), tokens=1)


def test_one_position_more_than_is_decoded(tmp_path, capsys):
    tiny("llama", max_position_embeddings=9).config.save_pretrained(tmp_path)
    text = printed(capsys, "--model", str(tmp_path))
    assert "; 1 random tokens" in text and "0 of 2 layers packed (2 native): " in text


def test_random_weights_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    tiny("llama").config.save_pretrained(tmp_path)
    monkeypatch.setattr(model_info, "available_memory", lambda: 100_000)
    assert "random ones in float32 would take 0.0 GB, and 0.0 GB of memory are free" in refused(model=str(tmp_path))
    monkeypatch.setattr(model_info, "available_memory", lambda: None)
    assert inspect_model(ModelInfoOptions(str(tmp_path))).report.layers[0].path == "packed"


def test_memory_is_known_here():
    assert 1e8 < model_info.available_memory() < 1e14


def test_a_model_that_cannot_continue_text_says_so(llama, monkeypatch):
    def broken(*_, **__):
        raise ValueError("needs pixel_values\nand more")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", broken)
    message = refused(model=str(llama))
    assert "it cannot continue text with transformers alone (ValueError: needs pixel_values)" in message


def test_a_model_that_only_our_cache_breaks_says_so(llama, monkeypatch):
    def broken(*_, **__):
        raise AttributeError("no such thing\nand more")

    monkeypatch.setattr(model_info.MixKVQCache, "update", broken)
    message = refused(model=str(llama))
    assert message.endswith("which is a bug of mixkvq (AttributeError: no such thing)")


def test_the_help_says_what_runs(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "The model is loaded, reads 512 tokens of documentation and decodes 8, once with each cache" in text


def test_the_commands_help_names_the_options(capsys):
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    text = capsys.readouterr().out
    assert all(option in text for option in ("--json", "--model DIR", "--tokens", "--preset", "--attn", "--dtype"))


@pytest.mark.slow
def test_a_real_model(capsys):
    pytest.importorskip("gguf")
    try:
        text = printed(capsys, "--model", "smollm2", "--tokens", "200")
    except UserError as error:
        pytest.skip(str(error))
    assert "30 of 30 layers packed" in text and "200 tokens of the Python documentation" in text
