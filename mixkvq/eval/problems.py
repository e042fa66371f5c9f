"""Grade-school maths problems with worked solutions: made here from a seed, or read from a JSON-lines file."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

NAMES = ("Ana", "Bram", "Chidi", "Dora", "Emil", "Farah", "Goro", "Hana", "Ivan", "Jun", "Kofi", "Lena")
THINGS = ("apples", "books", "candles", "eggs", "marbles", "pencils", "stamps", "tickets")


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, which ends in ``#### number``."""

    question: str
    answer: str

    @property
    def number(self) -> str:
        """The final number."""
        return self.answer.rpartition("####")[2].strip().replace(",", "")


def _shop(r: random.Random) -> Problem:
    name, thing, other = r.choice(NAMES), *r.sample(THINGS, 2)
    n, price, m, cost = r.randint(3, 12), r.randint(2, 9), r.randint(2, 9), r.randint(3, 15)
    paid = (n * price + m * cost) // 10 * 10 + 20
    total = n * price + m * cost
    return Problem(
        f"{name} buys {n} {thing} at ${price} each and {m} {other} at ${cost} each, and pays with ${paid}. "
        "How much change is due?",
        f"The {thing} cost {n} * {price} = ${n * price}.\nThe {other} cost {m} * {cost} = ${m * cost}.\n"
        f"Together that is {n * price} + {m * cost} = ${total}.\n"
        f"The change is {paid} - {total} = ${paid - total}.\n#### {paid - total}",
    )


def _share(r: random.Random) -> Problem:
    name, friend, thing = *r.sample(NAMES, 2), r.choice(THINGS)
    boxes, each, gave, children = r.randint(3, 9), r.choice((6, 8, 10, 12)), r.randint(2, 9), r.randint(2, 5)
    left = boxes * each - gave
    left -= left % children
    gave = boxes * each - left
    return Problem(
        f"{name} has {boxes} boxes with {each} {thing} in each. {name} gives {gave} of them to {friend} and shares "
        f"the rest equally among {children} children. How many {thing} does each child get?",
        f"{name} has {boxes} * {each} = {boxes * each} {thing}.\nAfter the gift {boxes * each} - {gave} = {left} are "
        f"left.\nEach child gets {left} / {children} = {left // children}.\n#### {left // children}",
    )


def _trip(r: random.Random) -> Problem:
    name, hours, speed, rest = r.choice(NAMES), r.randint(2, 6), r.randint(5, 12) * 10, r.randint(1, 4)
    slow = speed - r.randint(1, 4) * 10
    total = hours * speed + rest * slow
    return Problem(
        f"{name} drives {hours} hours at {speed} km per hour and then {rest} hours at {slow} km per hour. "
        "How many kilometres is that in all?",
        f"The first part is {hours} * {speed} = {hours * speed} km.\nThe second part is {rest} * {slow} = "
        f"{rest * slow} km.\nIn all {hours * speed} + {rest * slow} = {total} km.\n#### {total}",
    )


def _wage(r: random.Random) -> Problem:
    name, part = r.choice(NAMES), r.choice((2, 4))
    wage, days, hours = r.randint(8, 25), r.randint(3, 6), r.randint(4, 8)
    earned = wage * days * hours
    spent = earned // part
    return Problem(
        f"{name} earns ${wage} an hour and works {hours} hours a day on {days} days. {name} spends one "
        f"{'half' if part == 2 else 'quarter'} of it, rounded down to whole dollars, on rent. How much is left?",
        f"{name} works {hours} * {days} = {hours * days} hours.\nThat pays {hours * days} * {wage} = ${earned}.\n"
        f"The rent takes {earned} / {part} = ${spent}.\nWhat is left is {earned} - {spent} = ${earned - spent}.\n"
        f"#### {earned - spent}",
    )


_KINDS = (_shop, _share, _trip, _wage)


def made_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` problems with two to four steps; the same ones for the same seed."""
    r = random.Random(seed)
    return [r.choice(_KINDS)(r) for _ in range(count)]


def read_text(path: Path) -> str:
    """A text file's content; raises `UserError` where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text file (UTF-8)") from error


def read_problems(path: Path) -> list[Problem]:
    """Problems of a JSON-lines file with "question" and "answer", the answer ending in ``#### number`` (as GSM8K has).

    Raises
    ------
    UserError
        Naming the line that is none.
    """
    problems = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            row = json.loads(line)
            problem = Problem(str(row["question"]), re.sub(r"<<[^>]*>>", "", str(row["answer"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{path} line {number} must be an object with "question" and "answer"') from error
        if not re.fullmatch(r"-?[\d.]+", problem.number):
            raise UserError(f"{path} line {number}: the answer must end in '#### number'")
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} is empty, must hold at least one problem")
    return problems
