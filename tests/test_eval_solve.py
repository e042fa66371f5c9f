"""Maths problems as a task: questions and examples, and how lm-eval scores the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("scipy")
pytest.importorskip("lm_eval")

from mixkvq.errors import UserError
from mixkvq.eval.problems import Problem
from mixkvq.eval.scores import run_harness
from mixkvq.eval.solve import choose, task


def test_questions_and_examples_are_disjoint(tmp_path: Path) -> None:
    questions, shots = choose("made", 50, 6)
    assert len(questions) == 50 and len(shots) == 6 and not set(questions) & set(shots)
    assert choose("made", 80, 6)[0][:50] == questions  # more questions begin with the same
    file = tmp_path / "ten.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "answer": f"#### {i}"}) for i in range(10)))
    questions, shots = choose(str(file), 7, 3)
    assert [p.number for p in questions] == list("0123456") and [p.number for p in shots] == list("789")
    assert choose(str(file), 4, 3)[1] == shots  # fewer questions have the same examples
    with pytest.raises(UserError, match="holds 10, must hold at least 11"):
        choose(str(file), 8, 3)


def test_a_file_of_repeated_questions_is_told(tmp_path: Path) -> None:
    file = tmp_path / "same.jsonl"
    file.write_text("\n".join([json.dumps({"question": "q", "answer": "#### 1"})] * 5))
    with pytest.raises(UserError, match="repeats its questions"):
        choose(str(file), 3, 1)


@pytest.mark.parametrize(
    ("answer", "strict", "flexible"),
    [
        (" It is 6.\n#### 1234", 1, 1),
        (" #### 1,234\n\n", 1, 1),
        (" The answer is $1,234.", 0, 1),
        (" 1234 and then 6", 0, 0),
        (" #### 6\nno, 1234", 0, 1),
        ("", 0, 0),
    ],
)
def test_scoring(answer: str, strict: int, flexible: int) -> None:
    from lm_eval.api.model import LM

    prompts: list[str] = []

    class Parrot(LM):
        def loglikelihood(self, requests: Any) -> Any:
            raise AssertionError

        loglikelihood_rolling = loglikelihood

        def generate_until(self, requests: Any) -> list[str]:
            prompts.extend(r.args[0] for r in requests)
            assert all(r.args[1]["until"][0] == "Question:" and r.args[1]["max_gen_toks"] == 9 for r in requests)
            return [answer] * len(requests)

    made = task([Problem("How much?", "First 617*2.\n#### 1,234")], [Problem("What?", "One.\n#### 1")], 9)
    found = run_harness(Parrot(), [made])["results"]["problems"]
    assert (found["exact_match,strict"], found["exact_match,flexible"]) == (strict, flexible)
    assert prompts == ["Question: What?\nAnswer: One.\n#### 1\n\nQuestion: How much?\nAnswer:"]
