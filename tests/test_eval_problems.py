"""Maths problems: right answers, files, questions and examples, and how lm-eval scores them."""

# ruff: noqa: E402  (imports follow the skip where an optional package is absent)
from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixkvq.errors import UserError
from mixkvq.eval.problems import Problem, made_problems, read_problems


def solve(question: str) -> int:
    """The answer from the numbers of a made question, by what the question says."""
    n = [int(x) for x in re.findall(r"\d+", question)]
    if "pays with" in question:
        return n[4] - n[0] * n[1] - n[2] * n[3]
    if "boxes" in question:
        return (n[0] * n[1] - n[2]) // n[3]
    if "drives" in question:
        return n[0] * n[1] + n[2] * n[3]
    if "on rent" in question:
        earned = n[0] * n[1] * n[2]
        return earned - earned // (2 if "half" in question else 4)
    raise AssertionError(question)


@pytest.fixture(scope="module")
def many() -> list[Problem]:
    return made_problems(400, seed=7)


def test_made_problems_have_right_answers(many: list[Problem]) -> None:
    for problem in many:
        assert int(problem.number) == solve(problem.question), problem
        assert int(problem.number) >= 0


def test_every_step_of_a_made_solution_is_right(many: list[Problem]) -> None:
    steps = 0
    for problem in many:
        for a, op, b, c in re.findall(r"(\d+) ([*+/-]) (\d+) = \$?(\d+)", problem.answer):
            x, y = int(a), int(b)
            value = {"*": x * y, "+": x + y, "-": x - y, "/": x // y}[op]
            assert value == int(c), problem
            steps += 1
    assert steps >= 2 * len(many)


def test_all_kinds_of_problem_occur(many: list[Problem]) -> None:
    words = ("pays with", "boxes", "drives", "on rent")
    assert all(sum(w in p.question for p in many) > 40 for w in words)


def test_made_problems_are_the_same_for_the_same_seed() -> None:
    assert made_problems(5, 3) == made_problems(9, 3)[:5]
    assert made_problems(5, 3) != made_problems(5, 4)


def test_read_problems(tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    rows = [
        {"question": "How many?", "answer": "It is 2*3=<<2*3=6>>6.\n#### 6"},
        {"question": "How much?", "answer": "#### 1,234"},
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_problems(file)
    assert first == Problem("How many?", "It is 2*3=6.\n#### 6")  # without the calculator's notes
    assert first.number == "6" and second.number == "1234"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("nonsense", "line 1 must be an object"),
        ('{"question": "x"}', "line 1 must be an object"),
        ('{"question": "x", "answer": "y"}', "line 1: the answer must end in '#### number'"),
        ('{"question": "x", "answer": "#### 1"}\n{"question": "x", "answer": "#### one"}', "line 2: the answer"),
    ],
)
def test_wrong_files_are_told(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_problems(file)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        read_problems(tmp_path / "nowhere.jsonl")


pytest.importorskip("lm_eval")

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
