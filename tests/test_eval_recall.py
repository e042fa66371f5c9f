"""Hidden facts: what the documents say, and what is counted as an answer."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("scipy")

from eval_fixtures import Deaf, byte_model, ignore, save_byte_model

from mixkvq.cli import main
from mixkvq.errors import UserError
from mixkvq.eval.documents import TASKS, Document, document
from mixkvq.eval.recall import answer, key_of, measure, summarize
from mixkvq.eval.replay import Prefill
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_scheme, parse_schemes


def made(task: str, length: int = 1500, index: int = 0, questions: int = 3) -> Document:
    return document(byte_model()[1], task, length, index, questions)


def parts(doc: Document) -> tuple[str, list[tuple[str, str]]]:
    """The text of a document, and its questions with their answers."""
    decode, begin, found = byte_model()[1].decode, doc.text, []
    for first, behind in doc.answers:
        found.append((decode(doc.ids[begin:first]).strip("\n"), decode(doc.ids[first:behind])))
        begin = behind
    assert begin == len(doc.ids)  # nothing follows the last answer
    return decode(doc.ids[: doc.text]), found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 3000])
def test_a_document_is_as_long_as_asked(task: str, length: int) -> None:
    for index in range(3):
        doc = made(task, length, index)
        assert length - 310 <= len(doc.ids) <= length  # less than a sentence is missing
        assert len(doc.answers) == 3 and doc.text < doc.answers[0][0]


def test_needles_are_asked_for_in_the_words_of_the_text() -> None:
    text, asked = parts(made("needles"))
    assert len(re.findall(r"The secret number of \w+ is \d{4}\.\n", text)) == 3
    for question, number in asked:
        assert re.fullmatch(r"The secret number of \w+ is", question) and f"{question}{number}." in text


def test_pairs_fill_the_text() -> None:
    text, asked = parts(made("pairs"))
    lines = text.strip().split("\n")
    assert len(lines) > 40 and all(re.fullmatch(r"\w+ \w+: \d{4}", line) for line in lines)
    assert len({line.split(":")[0] for line in lines}) == len(lines)
    assert all(f"{question}{number}" in lines for question, number in asked)


def test_variables_are_answered_by_following_the_chain() -> None:
    text, asked = parts(made("variables"))
    given = dict(re.findall(r"^([a-z]{2}) = (\w+)$", text, re.MULTILINE))
    assert len(given) == 6
    for question, answered in asked:
        name = question.removesuffix(" =")
        assert answered == f" {given[name]} = {given[given[name]]}" and given[given[name]].isdecimal()


def test_documents_are_the_same_for_the_same_index_and_others_for_another() -> None:
    assert made("needles") == made("needles")
    assert made("needles").digest != made("needles", index=1).digest


@pytest.mark.parametrize(
    ("task", "length", "questions", "message"),
    [
        ("needles", 100, 3, "--lengths: 100 tokens are too few for 3 questions about needles"),
        ("pairs", 150, 20, "too few for 20 questions about pairs"),
        ("pairs", 60000, 3, "too many for pairs, must be at most"),
    ],
)
def test_lengths_that_cannot_be_are_told(task: str, length: int, questions: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(task, length, 0, questions)


def test_an_answer_is_scored_as_one_plain_pass_scores_it() -> None:
    model, _ = byte_model()
    doc = made("pairs", 900)
    prefill = Prefill.record(model, torch.tensor([doc.ids[: doc.text]]))
    found = answer(model, doc, prefill, parse_scheme("exact"))
    with torch.inference_mode():
        log_p = model(torch.tensor([doc.ids])).logits[0].log_softmax(-1)
    for i, (first, behind) in enumerate(doc.answers):
        want = [float(log_p[t - 1, doc.ids[t]]) for t in range(first, behind)]
        assert found["log_probability"][i] == pytest.approx(sum(want), abs=1e-3)
        assert found["right"][i] == all(int(log_p[t - 1].argmax()) == doc.ids[t] for t in range(first, behind))


def test_an_answer_is_right_if_the_model_would_write_it() -> None:
    """Answers replaced by what the model does say: all are right then."""
    model, _ = byte_model()
    doc, ids = made("needles", 700), list(made("needles", 700).ids)
    with torch.inference_mode():
        for first, behind in doc.answers:
            for t in range(first, behind):
                ids[t] = int(model(torch.tensor([ids[:t]])).logits[0, -1].argmax())
    written = Document(doc.task, doc.length, doc.index, tuple(ids), doc.text, doc.answers)
    prefill = Prefill.record(model, torch.tensor([ids[: doc.text]]))
    assert answer(model, written, prefill, parse_scheme("exact"))["right"] == [1, 1, 1]
    ids[doc.answers[1][1] - 1] += 1 if ids[doc.answers[1][1] - 1] == 1 else -1
    spoilt = Document(doc.task, doc.length, doc.index, tuple(ids), doc.text, doc.answers)
    assert answer(model, spoilt, prefill, parse_scheme("exact"))["right"][:2] == [1, 0]


def test_lossless_is_exact_coarse_is_not_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    model, _ = byte_model()
    documents = [made(task, 700, index) for task in TASKS for index in range(2)]
    schemes = parse_schemes("exact,lossless,compact")
    events: list[Any] = []
    measure(model, documents, schemes, Results(tmp_path / "r.jsonl"), lambda *e: events.append(e))
    assert events[0] == ("chunk", (0, 18)) and events[-1] == ("chunk", (18, 18))
    before = (tmp_path / "r.jsonl").read_text()
    results = Results(tmp_path / "r.jsonl")
    measure(Deaf(model), documents, schemes, results, ignore)
    assert (tmp_path / "r.jsonl").read_text() == before
    rows = summarize(model, documents, schemes, results, schemes[0])
    assert [(r.task, r.scheme.name) for r in rows] == [(t, s.name) for t in TASKS for s in schemes]
    for row in rows:
        found = [results.find(key_of(model, d, row.scheme)) for d in documents if d.task == row.task]
        assert row.log_probability.value == pytest.approx(np.mean([r["log_probability"] for r in found if r]))
        assert row.documents == 2 and row.answers == 6
        if row.scheme.name == "compact":
            assert abs(row.log_change.value) > 1e-3 and row.true_bits is not None and row.true_bits < 4
        else:
            assert abs(row.log_change.value) < 1e-4 and row.right_change.value == 0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(save_byte_model(tmp_path / "model"))
    args = ["eval", "recall", "--model", folder, "--schemes", "lossless", "--lengths", "500,600", "--documents", "1"]
    args += ["--questions", "2", "--tasks", "pairs", "--threads", "1", "--out", str(tmp_path)]
    assert main(args) == 0
    lines = (tmp_path / "results.jsonl").read_text()
    assert len(lines.splitlines()) == 4 and "teacher-forced" in capsys.readouterr().out
    assert main(args) == 0 and (tmp_path / "results.jsonl").read_text() == lines


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lengths", "1k", "--lengths is '1k', must be positive integers"),
        ("--lengths", "", "--lengths is ''"),
        ("--tasks", "needle", "--tasks is 'needle', must be some of needles, pairs, variables"),
        ("--tasks", "pairs,pairs", "each once"),
        ("--documents", "0", "--documents is 0, must be at least 1"),
        ("--questions", "99", "--questions is 99, must be from 1 to 52"),
    ],
)
def test_wrong_options_are_told(option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "recall", option, value]) == 1
    assert message in capsys.readouterr().err
