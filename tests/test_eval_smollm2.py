"""Measurements of what a real model does: SmolLM2-135M-Instruct from its wheel. Skipped where that is absent."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("gguf")
pytest.importorskip("scipy")

from eval_fixtures import ignore

from mixkvq.errors import UserError
from mixkvq.eval import generate, recall
from mixkvq.eval.checkpoints import SMOLLM2
from mixkvq.eval.documents import document
from mixkvq.eval.models import load
from mixkvq.eval.results import Results
from mixkvq.eval.schemes import parse_schemes
from mixkvq.eval.texts import windows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Any:
    try:
        SMOLLM2.require()
    except UserError as error:
        pytest.skip(str(error))
    return load(dtype="float32")


@pytest.mark.parametrize("task", ["needles", "pairs"])
def test_the_model_finds_facts_far_more_often_than_chance(smollm2: Any, task: str, tmp_path: Path) -> None:
    """Else the measurement would measure nothing. Chance is 1 in 9000."""
    model, tokenizer = smollm2
    documents = [document(tokenizer, task, 1024, index) for index in range(3)]
    schemes = parse_schemes("exact,lossless,kivi-2")
    results = Results(tmp_path / "r.jsonl")
    recall.measure(model, documents, schemes, results, ignore)
    exact, lossless, kivi = recall.summarize(model, documents, schemes, results, schemes[0])
    assert exact.right.value >= 0.4
    assert lossless.right.value == exact.right.value and abs(lossless.log_change.value) < 1e-3
    assert kivi.log_change.value < -1 and kivi.right_change.value < -0.2


def test_greedy_continuations(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    prompts = windows(tokenizer, "prose", 2, 400)
    schemes = parse_schemes("exact,lossless,default")
    results = Results(tmp_path / "r.jsonl")
    generate.measure(model, prompts, 40, schemes, results, ignore)
    _, lossless, default = generate.summarize(model, prompts, 40, schemes, results, schemes[0], schemes[2])
    assert lossless.identical.value == 1
    assert default.true_bits is not None and default.true_bits <= 3.29


def test_solutions_through_lm_eval(smollm2: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from mixkvq.eval.scores import compare, evaluate
    from mixkvq.eval.solve import choose, task

    model, tokenizer = smollm2
    questions, shots = choose("made", 4, 3)
    schemes = parse_schemes("exact,lossless")
    results = Results(tmp_path / "r.jsonl")
    rows = compare(
        schemes,
        schemes[0],
        lambda scheme: evaluate(model, tokenizer, scheme, [task(questions, shots, 100)], results, ignore, batch_size=4),
    )
    texts = [values["text"] for values in results._known.values() if "text" in values]
    assert len(texts) == 8 and texts[:4] == texts[4:] and sum("####" in text for text in texts) >= 4
    assert [row.change.value for row in rows if row.change] == [0, 0, 0, 0]
