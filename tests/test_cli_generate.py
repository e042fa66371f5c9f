"""`mixkvq generate` and the parts of `mixkvq demo`, on a tiny random model."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("typer")

from cli_fixtures import WORDS, save_tiny_model
from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.cli import main
from mixkvq.cli.answer import answer
from mixkvq.cli.text import chat_ids
from mixkvq.compat import cache_argument
from mixkvq.eval.memory import PeakMemory
from mixkvq.eval.models import load

PROMPT = " ".join(WORDS * 15)  # 240 words: one block and more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def by_hand(folder: str, prompt: str, cache: Any, new: int) -> str:
    model, tokenizer = load(folder)
    ids = chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=new, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def test_generate_prints_what_the_model_says(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["generate", "--model", folder, "--preset", "lossless", "--max-new-tokens", "12", PROMPT]
    assert main(args) == 0
    assert capfd.readouterr().out == by_hand(folder, PROMPT, DynamicCache(), 12) + "\n"


def test_generate_reads_standard_input_and_reports(
    folder: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert main(["generate", "--model", folder, "--max-new-tokens", "5", "--report", "-"]) == 0
    shown = capfd.readouterr()
    assert shown.out == by_hand(folder, PROMPT, MixKVQCache(), 5) + "\n"
    assert "packed" in shown.err and "tokens/s" in shown.err


def test_sampling_depends_on_the_seed_alone(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        main(["generate", "--model", folder, "--temperature", "2", "--seed", seed, "--max-new-tokens", "20", "the cat"])
        texts.append(capfd.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_tokenizer_without_a_template_gets_the_text(tmp_path: Path) -> None:
    _, tokenizer = load(str(save_tiny_model(tmp_path, chat=False)))
    assert tokenizer.decode(chat_ids(tokenizer, [{"role": "user", "content": "the cat"}])[0]) == "the cat"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "defualt"], "--preset: unknown preset 'defualt'; known: .* did you mean 'default'"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0, must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0, must be 0"),
        (["--threads", "0"], "--threads is 0, must be at least 1"),
        (["--dtype", "int8"], "--dtype is 'int8', must be one of"),
        (["--model", "./nowhere"], "--model is './nowhere', must be a folder"),
    ],
)
def test_wrong_options(folder: str, args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, *args, "the cat"]) == 1
    assert re.search(message, capfd.readouterr().err)


def test_an_empty_prompt(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", folder, " "]) == 1
    assert "the prompt is empty" in capfd.readouterr().err


def test_an_unknown_option_is_a_usage_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--modle", "x", "hi"]) == 2
    assert "--modle" in capfd.readouterr().err


def test_answer_measures_the_run(folder: str) -> None:
    model, tokenizer = load(folder)
    ids = chat_ids(tokenizer, [{"role": "user", "content": PROMPT}])
    events: list[tuple[str, Any]] = []
    result = answer(
        model, tokenizer, ids, DynamicCache(), lambda *e: events.append(e), max_new_tokens=9, do_sample=False
    )
    n = ids.shape[1]
    assert result.prompt_tokens == n and len(result.ids) == 9 and result.cache_tokens == n + 8
    assert result.cache_bytes == 2 * 2 * 2 * 16 * 4 * (n + 8)
    assert result.trace == [(n + i, 2 * 2 * 2 * 16 * 4 * (n + i)) for i in range(9)]
    assert result.prompt_seconds > 0 and result.decode_seconds > 0
    assert result.decode_rate == pytest.approx(8 / result.decode_seconds)
    assert [value for event, value in events if event == "layer"] == [(1, 2), (2, 2)]
    assert "".join(value for event, value in events if event == "text") == result.text
    assert result.text == tokenizer.decode(result.ids, skip_special_tokens=True)


def test_peak_memory_sees_a_tensor_that_is_gone() -> None:
    peak = PeakMemory()
    peak.start()
    if peak.extra is None:
        pytest.skip("this system does not let a process reset its memory mark")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert 60 << 20 < peak.extra < 200 << 20
