"""Maths problems: right answers, and files of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
