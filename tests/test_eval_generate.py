"""Greedy continuations and batches: against token-by-token decoding, and the lossless scheme against the exact one."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")

from eval_fixtures import END, Deaf, byte_model, ignore, save_byte_model
from transformers import Cache, DynamicCache, QuantizedCache
from transformers.cache_utils import DynamicLayer

from mixkvq import MixKVQCache
from mixkvq.cli import main
from mixkvq.compat import cache_argument
from mixkvq.eval import batches
from mixkvq.eval.batches import continue_batch, pad_left, read_batch
from mixkvq.eval.generate import greedy, kept, key_of, measure, summarize
from mixkvq.eval.replay import Prefill
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_scheme, parse_schemes
from mixkvq.eval.texts import Window, windows


def by_hand(ids: list[int], new: int, cache: Any = None, *, last_alone: bool = False) -> list[int]:
    """Token by token, all of it read again each time unless there is a cache; `last_alone`: so is the prompt's last."""
    model, _ = byte_model()
    found: list[int] = []
    with torch.inference_mode():
        if last_alone:
            model(torch.tensor([ids[:-1]]), **cache_argument(cache))
            ids = ids[-1:]
        while len(found) < new:
            if cache is None:
                logits = model(torch.tensor([ids + found])).logits
            else:
                feed = found[-1:] or ids
                logits = model(torch.tensor([feed]), **cache_argument(cache)).logits
            found.append(int(logits[0, -1].argmax()))
    return found


@pytest.fixture(scope="module")
def prompts() -> list[Window]:
    return windows(byte_model()[1], "prose", 3, 200)


def test_kept() -> None:
    assert kept([1, 2, 3], [1, 2, 3]) == 3
    assert kept([1, 2, 3], [1, 5, 3]) == 1
    assert kept([4, 2, 3], [1, 2, 3]) == 0


@pytest.mark.parametrize("scheme", ["exact", "default", "lossless"])
def test_greedy_is_token_by_token_decoding(prompts: list[Window], scheme: str) -> None:
    model, _ = byte_model()
    parsed = parse_scheme(scheme)
    prefill = Prefill.record(model, torch.tensor([p.ids for p in prompts]))
    found = greedy(model, prefill, parsed.cache(model), 80)
    assert found == [by_hand(list(p.ids), 80, parsed.cache(model)) for p in prompts]


def test_lossless_is_identical_and_coarse_is_not(prompts: list[Window], tmp_path: Path) -> None:
    model, _ = byte_model()
    schemes = parse_schemes("exact,lossless,compact,default")
    results = Results(tmp_path / "results.jsonl")
    measure(model, prompts, 48, schemes, results, ignore, batch=2)
    exact, lossless, compact, _ = summarize(model, prompts, 48, schemes, results, schemes[0], schemes[3])
    assert exact.identical.value == lossless.identical.value == 1 and lossless.median == 48
    assert compact.identical.value < 1 and compact.kept.value < 48
    assert exact.true_bits is None and lossless.true_bits is not None and 32 < lossless.true_bits < 34
    assert compact.true_bits is not None and compact.true_bits < 4  # head_dim 16: more metadata per number
    # against the tokens themselves
    rows = [results.find(key_of(model, p, 48, schemes[2])) for p in prompts]
    lengths = [
        kept(row["tokens"], by_hand(list(p.ids), 48, DynamicCache()))
        for row, p in zip(rows, prompts, strict=True)
        if row
    ]
    assert compact.kept.value == pytest.approx(np.mean(lengths))


def test_what_is_known_is_not_measured_again(prompts: list[Window], tmp_path: Path) -> None:
    model, _ = byte_model()
    schemes = parse_schemes("exact,default")
    events: list[Any] = []
    measure(model, prompts, 5, schemes, Results(tmp_path / "r.jsonl"), lambda *e: events.append(e), batch=2)
    assert [e[1] for e in events] == [(2, 6), (4, 6), (5, 6), (6, 6)]
    before = (tmp_path / "r.jsonl").read_text()
    measure(Deaf(model), prompts, 5, schemes, Results(tmp_path / "r.jsonl"), ignore, batch=2)
    assert (tmp_path / "r.jsonl").read_text() == before
    # a line is lost: that prompt is continued again, with the same result
    lines = before.splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_text("".join(lines[:-1]))
    measure(model, prompts, 5, schemes, Results(tmp_path / "r.jsonl"), ignore, batch=2)
    assert (tmp_path / "r.jsonl").read_text() == before


def test_pad_left() -> None:
    ids, mask = pad_left([[5], [7, 8, 9]], 3)
    assert ids.tolist() == [[3, 3, 5], [7, 8, 9]] and mask.tolist() == [[0, 0, 1], [1, 1, 1]]


@lru_cache(maxsize=1)
def ragged() -> list[list[int]]:
    """Prompts of different lengths, past and below the exact window."""
    ids = windows(byte_model()[1], "prose", 1, 900)[0].ids
    return [list(ids[:300]), list(ids[300:430]), list(ids[430:740]), list(ids[740:750])]


@pytest.mark.parametrize("stage", [7, 32])
@pytest.mark.parametrize("preset", [None, "lossless", "default"])
def test_rows_of_a_batch_are_continued_as_if_alone(
    preset: str | None, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows end at different tokens, so the batch shrinks on its way."""
    model, tokenizer = byte_model()
    monkeypatch.setattr(batches, "STAGE", stage)

    def cache() -> Any:
        return DynamicCache(config=model.config) if preset is None else MixKVQCache(preset, config=model.config)

    alone = [by_hand(ids, 40, cache(), last_alone=True) for ids in ragged()]
    stops = [tokenizer.decode(alone[0][9:11]), tokenizer.decode(alone[2][20:22])]
    want = []
    for tokens in alone:
        text_ends = [i for i in range(len(tokens)) if any(s in tokenizer.decode(tokens[: i + 1]) for s in stops)]
        ends = [i for i, token in enumerate(tokens) if token == END]
        want.append(tokens[: min([*text_ends, *ends, len(tokens) - 1]) + 1])
    assert len({len(tokens) for tokens in want}) > 1
    for prefill in (None, read_batch(model, tokenizer, ragged())):
        assert continue_batch(model, tokenizer, ragged(), cache(), 40, stops, prefill, do_sample=False) == want


def test_an_end_token_ends_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = byte_model()
    alone = [by_hand(ids, 40, DynamicCache()) for ids in ragged()]
    end = alone[0][5]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    want = [tokens[: tokens.index(end) + 1] if end in tokens else tokens for tokens in alone]
    cache = DynamicCache(config=model.config)
    assert continue_batch(model, tokenizer, ragged(), cache, 40, do_sample=False) == want


def test_a_cache_that_cannot_drop_rows_keeps_them() -> None:
    """transformers' QuantizedCache; here with an exact "quantizer"."""
    model, tokenizer = byte_model()

    class Kept(QuantizedCache):
        def __init__(self) -> None:
            Cache.__init__(self, layers=[DynamicLayer() for _ in range(2)])

        def batch_select_indices(self, indices: Any) -> None:
            raise AssertionError("rows were dropped")

    alone = [by_hand(ids, 40, DynamicCache()) for ids in ragged()]
    stop = tokenizer.decode(alone[0][3:5])
    found = continue_batch(model, tokenizer, ragged(), Kept(), 40, [stop], do_sample=False)
    assert found[0] == alone[0][: len(found[0])] and len(found[0]) <= 5 and len(max(found, key=len)) > 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_byte_model(tmp_path_factory.mktemp("bytes")))


def test_the_command(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["eval", "generate", "--model", folder, "--schemes", "default,lossless", "--count", "2", "--prompt", "160"]
    args += ["--max-new-tokens", "6", "--threads", "1", "--out", str(tmp_path / "out")]
    assert main(args) == 0
    lines = (tmp_path / "out" / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 6
    assert "lossless" in capsys.readouterr().out
    assert main(args) == 0
    assert (tmp_path / "out" / "results.jsonl").read_text() == lines


def test_the_command_with_problems(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    args = ["eval", "generate", "--model", folder, "--schemes", "lossless,compact", "--problems", "made"]
    args += ["--count", "3", "--shots", "1", "--batch", "2", "--max-new-tokens", "40", "--threads", "1"]
    args += ["--out", str(tmp_path)]
    assert main(args) == 0
    results = Results(tmp_path / "results.jsonl")
    texts: dict[str, dict[str, str]] = {"exact": {}, "lossless": {}, "compact": {}}
    for key, values in results._known.items():
        if "text" in values:
            texts[json.loads(key)["scheme"]][json.loads(key)["request"]] = values["text"]
    assert [len(found) for found in texts.values()] == [3, 3, 3] and texts["lossless"] == texts["exact"]
    assert "exact_match,strict" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--count", "0", "--count is 0, must be at least 1"),
        ("--prompt", "0", "--prompt is 0"),
        ("--max-new-tokens", "-3", "--max-new-tokens is -3"),
        ("--shots", "-1", "--shots is -1"),
        ("--batch", "0", "--batch is 0"),
        ("--domains", "", "--domains is ''"),
        ("--baseline", "kivi-2", "--baseline is 'kivi-2', must be one of --schemes: exact, default"),
        ("--problems", "nowhere.jsonl", "nowhere.jsonl cannot be read"),
    ],
)
def test_wrong_options_are_told(
    folder: str, tmp_path: Path, option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["eval", "generate", "--model", folder, "--schemes", "default", "--out", str(tmp_path), option, value]
    assert main(args) == 1
    assert message in capsys.readouterr().err
