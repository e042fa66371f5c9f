"""The model class for lm-evaluation-harness: its likelihoods and texts against plain computations."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("lm_eval")

from eval_fixtures import Deaf, byte_model, save_byte_model
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from mixkvq.cli import main
from mixkvq.compat import cache_argument
from mixkvq.errors import UserError
from mixkvq.eval.batches import continue_batch
from mixkvq.eval.lm import MixKVQLM
from mixkvq.eval.results import Results
from mixkvq.eval.texts import prose

TEXT = prose()


def lm(preset: str = "exact", **options: Any) -> MixKVQLM:
    model, tokenizer = byte_model()
    return MixKVQLM(model, preset, tokenizer=tokenizer, **options)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS = [
    (TEXT[:400], TEXT[400:420]),
    (TEXT[:400], " another ending"),
    ("short", " one"),
    ("", "no context"),
    (TEXT[500:700], TEXT[700:1000]),  # the continuation spans block borders
]


def plain(context: str, continuation: str) -> tuple[float, bool]:
    model, tokenizer = byte_model()
    first = tokenizer.encode(context) or [tokenizer.eos_token_id]
    ids = torch.tensor([first + tokenizer.encode(continuation)])
    with torch.inference_mode():
        log_p = model(ids).logits[0, len(first) - 1 : -1].log_softmax(-1)
    want = ids[0, len(first) :]
    return float(log_p.gather(1, want[:, None]).sum()), bool((log_p.argmax(-1) == want).all())


@pytest.mark.parametrize("preset", ["exact", "lossless"])
def test_likelihoods_are_those_of_one_plain_pass(preset: str) -> None:
    for (log_p, greedy), pair in zip(lm(preset).loglikelihood(requests("loglikelihood", PAIRS)), PAIRS, strict=True):
        assert log_p == pytest.approx(plain(*pair)[0], abs=2e-3)
        assert greedy is plain(*pair)[1]


def test_a_greedy_continuation_is_found_greedy() -> None:
    model, tokenizer = byte_model()
    context, measured = tokenizer.encode(TEXT[:300]), lm("lossless")
    cache = measured.scheme.cache(model)
    written = continue_batch(model, tokenizer, [context], cache, 12, do_sample=False)[0]
    spoilt = [*written[:-1], written[-1] % 200 + 1]
    found = measured._loglikelihood_tokens([(None, context, written), (None, context, spoilt)])
    assert len(written) == 12 and [greedy for _, greedy in found] == [True, False]


def test_likelihoods_are_read_from_coded_blocks_as_in_decoding() -> None:
    """Chunks give what feeding token by token gives, and not what an exact cache gives."""
    model, tokenizer = byte_model()
    measured = lm("default")
    found = measured.loglikelihood(requests("loglikelihood", [PAIRS[4]]))[0][0]
    context, continuation = (tokenizer.encode(part) for part in PAIRS[4])
    cache, total = measured.scheme.cache(model), 0.0
    with torch.inference_mode():
        model(torch.tensor([context[:-1]]), **cache_argument(cache))
        for token, following in zip([context[-1], *continuation], continuation, strict=False):
            logits = model(torch.tensor([[token]]), **cache_argument(cache)).logits[0, -1]
            total += float(logits.log_softmax(-1)[following])
    assert found == pytest.approx(total, rel=1e-4)
    assert abs(found - plain(*PAIRS[4])[0]) > 0.05
    assert measured.answered[0]["record_elements"] > 0


def test_rolling_likelihoods() -> None:
    texts = [(TEXT[:300],), (TEXT[300:310],)]
    for preset in ("exact", "lossless"):
        found = lm(preset).loglikelihood_rolling(requests("loglikelihood_rolling", texts))
        assert found == pytest.approx([plain("", text)[0] for (text,) in texts], abs=2e-3)
    coded = lm("compact").loglikelihood_rolling(requests("loglikelihood_rolling", texts))
    assert abs(coded[0] - found[0]) > 0.05 and coded[1] == pytest.approx(found[1], abs=1e-3)  # 10 bytes stay exact


def test_too_long_texts_lose_their_beginning() -> None:
    pair = (TEXT[:500], TEXT[500:510])
    found = lm("exact", max_length=200).loglikelihood(requests("loglikelihood", [pair]))[0][0]
    assert found == pytest.approx(plain(TEXT[309:500], TEXT[500:510])[0], abs=2e-3)


PROMPTS = [(TEXT[i : i + n], {"max_gen_toks": 20, "until": ["\n"]}) for i, n in ((0, 150), (50, 320), (7, 40))]


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("preset", ["exact", "lossless"])
def test_texts_come_in_the_order_of_the_prompts(preset: str, batch: int) -> None:
    model, tokenizer = byte_model()
    found = lm(preset, batch_size=batch).generate_until(requests("generate_until", PROMPTS))
    for (prompt, _), text in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(out, skip_special_tokens=True).split("\n")[0]


def test_stop_strings_are_cut_off() -> None:
    whole = lm().generate_until(requests("generate_until", [(TEXT[:200], {"max_gen_toks": 30})]))[0]
    stop = whole[10:13]
    options = {"max_gen_toks": 30, "until": stop}
    cut = lm(batch_size=2).generate_until(requests("generate_until", [(TEXT[:200], options), PROMPTS[0]]))[0]
    assert cut == whole.split(stop)[0]


def test_answers_are_kept(tmp_path: Path) -> None:
    first = lm("default", results=Results(tmp_path / "r.jsonl"), batch_size=2)
    texts = first.generate_until(requests("generate_until", PROMPTS))
    scores = first.loglikelihood(requests("loglikelihood", PAIRS))
    events: list[Any] = []
    again = lm("default", results=Results(tmp_path / "r.jsonl"), batch_size=2, emit=lambda *e: events.append(e))
    again._model = Deaf(again._model)
    assert again.generate_until(requests("generate_until", PROMPTS)) == texts
    assert again.loglikelihood(requests("loglikelihood", PAIRS)) == scores
    assert again.answered == first.answered and events[0] == ("chunk", (3, 3))
    with pytest.raises(AssertionError, match="was run"):  # another scheme is another measurement
        other = lm("compact", results=Results(tmp_path / "r.jsonl"))
        other._model = Deaf(other._model)
        other.loglikelihood(requests("loglikelihood", PAIRS))


def test_registered_for_lm_evals_own_command(tmp_path: Path) -> None:
    assert get_model("mixkvq") is MixKVQLM
    arguments = f"pretrained={save_byte_model(tmp_path)},preset=lossless,dtype=float32"
    made = MixKVQLM.create_from_arg_string(arguments, {"batch_size": "2", "max_batch_size": None, "device": None})
    assert made.scheme.name == "lossless" and made.batch_size == 2
    assert made.loglikelihood(requests("loglikelihood", PAIRS[:1]))[0][0] == pytest.approx(
        plain(*PAIRS[0])[0], abs=2e-3
    )


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(UserError, match="'nonsense': unknown"):
        lm("nonsense")
    for size in ("auto", 0, "-1"):
        with pytest.raises(ValueError, match=f"batch_size is '?{size}'?, must be at least 1"):
            lm(batch_size=size)
    with pytest.raises(ValueError, match="max_gen_toks is 5000, must be below the model's 4096 positions"):
        lm().generate_until(requests("generate_until", [("x", {"max_gen_toks": 5000})]))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice task of its own."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": TEXT[i * 400 : i * 400 + 350], "choices": [" one", " two", " three"], "answer": i % 3}
        for i in range(4)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'rows.jsonl'}\n"
        'test_split: test\noutput_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\nmetric_list:\n  - metric: acc\n'
    )
    return folder


def test_the_command(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = str(save_byte_model(tmp_path / "model"))
    args = ["eval", "lm-eval", "--model", folder, "--schemes", "lossless,compact", "--tasks", "own", "--limit", "3"]
    args += ["--include-path", str(tasks), "--threads", "1", "--out", str(tmp_path)]
    assert main(args) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    scores = {row["key"]["scheme"]: row["values"] for row in rows if row["key"]["measure"] == "lm-eval"}
    assert len(rows) == 3 * 9 + 3 and scores["exact"]["value"] == scores["lossless"]["value"]
    assert 32 < scores["lossless"]["true_bits"] < 34 and scores["compact"]["true_bits"] < 4
    assert {row["key"]["samples"] for row in rows if row["key"]["measure"] == "lm-eval"} == {3}
    likelihoods = {
        scheme: [
            r["values"]["log_probability"] for r in rows if r["key"]["scheme"] == scheme and "greedy" in r["values"]
        ]
        for scheme in ("exact", "lossless", "compact")
    }
    assert likelihoods["lossless"] == pytest.approx(likelihoods["exact"], abs=2e-3)
    assert likelihoods["compact"] != pytest.approx(likelihoods["exact"], abs=2e-2)
    assert "own acc,none" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", ""], "--tasks is ''"),
        pytest.param(["--tasks", "no_such_task"], "lm-eval does not know no_such_task", marks=pytest.mark.slow),
        (["--tasks", "own", "--include-path", "nowhere"], "--include-path is nowhere, must be a folder"),
        (["--tasks", "own", "--limit", "0"], "--limit is 0"),
        (["--tasks", "own", "--num-fewshot", "-1"], "--num-fewshot is -1"),
    ],
)
def test_wrong_options_are_told(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "lm-eval", *options]) == 1
    assert message in capsys.readouterr().err
