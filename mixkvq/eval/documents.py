"""Documents that hide facts, and questions about them: made on the spot, at any length, the same for the same index.

==============  =======================================================================================
``needles``     sentences such as "The secret number of Oslo is 4821." in prose; asked in the same words
``pairs``       nothing but lines "Oslo apple: 4821", as many as fit: associative recall among many keys
``variables``   assignments in prose, ``ab = 4821`` and further on ``cd = ab``; asked ``cd =``, the answer
                goes the way back, ``ab = 4821``
==============  =======================================================================================

Every answer ends in four digits: chance is 1 in 9000, or less.
"""

from __future__ import annotations

import functools
import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any

from ..errors import UserError
from .texts import prose

PLACES = (
    "Amsterdam", "Athens", "Berlin", "Bogota", "Boston", "Brussels", "Cairo", "Chicago", "Copenhagen", "Dallas",
    "Delhi", "Denver", "Dublin", "Geneva", "Hamburg", "Helsinki", "Houston", "Istanbul", "Jakarta", "Kyoto", "Lagos",
    "Lima", "Lisbon", "London", "Madrid", "Manila", "Melbourne", "Miami", "Milan", "Montreal", "Moscow", "Mumbai",
    "Munich", "Nairobi", "Naples", "Oslo", "Paris", "Prague", "Rome", "Santiago", "Seattle", "Seoul", "Shanghai",
    "Stockholm", "Sydney", "Tokyo", "Toronto", "Vancouver", "Venice", "Vienna", "Warsaw", "Zurich",
)  # fmt: skip
THINGS = (
    "apple", "ball", "boat", "book", "bottle", "box", "bridge", "button", "castle", "chair", "clock", "coat", "cup",
    "desk", "door", "engine", "field", "flower", "garden", "glass", "hammer", "hat", "horse", "island", "jacket",
    "kitchen", "ladder", "lamp", "mirror", "orange", "paper", "pencil", "river", "road", "ship", "station", "stone",
    "table", "tree", "window",
)  # fmt: skip
CHAIN = 2
"""Variables of a chain."""
MOST_QUESTIONS = len(PLACES)


@dataclass(frozen=True)
class Document:
    """A text with questions and their answers behind it.

    Attributes
    ----------
    task : str
    length : int
        Tokens asked for; ``ids`` has as many or somewhat less.
    index : int
    ids : tuple of int
        All of it: text, questions and answers.
    text : int
        Tokens of the text alone.
    answers : tuple of (int, int)
        First token of each answer, and the one behind its last.
    """

    task: str
    length: int
    index: int
    ids: tuple[int, ...]
    text: int
    answers: tuple[tuple[int, int], ...]

    @property
    def digest(self) -> str:
        """Says which tokens these are."""
        return hashlib.sha256(repr((self.ids, self.text, self.answers)).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Riddle:
    """Facts to hide, each a line, in their order; questions with answers, which begin with a space."""

    facts: list[str]
    questions: list[tuple[str, str]]


def _number(r: random.Random) -> str:
    return str(r.randint(1000, 9999))


def _needles(r: random.Random, count: int) -> Riddle:
    known = {place: _number(r) for place in r.sample(PLACES, count)}
    return Riddle(
        [f"The secret number of {place} is {number}." for place, number in known.items()],
        [(f"The secret number of {place} is", f" {number}") for place, number in known.items()],
    )


def _pairs(r: random.Random) -> Riddle:
    keys = [f"{place} {thing}" for place in PLACES for thing in THINGS]
    known = {key: _number(r) for key in r.sample(keys, len(keys))}
    return Riddle(
        [f"{key}: {number}" for key, number in known.items()],
        [(f"{key}:", f" {number}") for key, number in known.items()],
    )


def _variables(r: random.Random, count: int) -> Riddle:
    names = r.sample([x + y for x in ascii_lowercase for y in ascii_lowercase], CHAIN * count)
    chains = [[_number(r), *names[i::count]] for i in range(count)]
    facts = [f"{chain[step]} = {chain[step - 1]}" for step in range(1, CHAIN + 1) for chain in chains]
    return Riddle(facts, [(f"{chain[-1]} =", f" {' = '.join(chain[-2::-1])}") for chain in chains])


Size = Callable[[str], int]
"""Tokens of a line with its end."""
Lines = tuple[list[str], list[tuple[str, str]]]
"""Lines of a text, and the questions about it."""


def _room(size: Size, length: int, questions: list[tuple[str, str]]) -> int:
    """Tokens that questions leave for the text; a few are kept back, since lines may join at their seams."""
    return length - sum(size(question + answer) for question, answer in questions) - 4


def _in_prose(make: Callable[[random.Random, int], Riddle], size: Size, r: random.Random, length: int, n: int) -> Lines:
    """Facts, in their order, between sentences that fill the room."""
    riddle, sentences, lines = make(r, n), _sentences(), list[str]()
    questions = r.sample(riddle.questions, n)
    room = _room(size, length, questions) - sum(map(size, riddle.facts))
    at = r.randrange(len(sentences))
    while room >= size(sentences[at % len(sentences)]):
        lines.append(sentences[at % len(sentences)])
        room, at = room - size(lines[-1]), at + 1
    places = sorted(r.choices(range(len(lines) + 1), k=len(riddle.facts)), reverse=True)
    for place, fact in zip(places, reversed(riddle.facts), strict=True):
        lines.insert(place, fact)
    return lines, questions


def _as_many_as_fit(size: Size, r: random.Random, length: int, n: int) -> Lines:
    """A list of pairs, ``n`` of them asked for."""
    riddle, known = _pairs(r), 0
    longest = sorted(riddle.questions, key=lambda pair: size("".join(pair)))[-n:]
    room = _room(size, length, longest)
    while known < len(riddle.facts) and room >= size(riddle.facts[known]):
        room, known = room - size(riddle.facts[known]), known + 1
    if known == len(riddle.facts):
        raise UserError(f"--lengths: {length} tokens are too many for pairs, must be at most {length - room}")
    return riddle.facts[:known], r.sample(riddle.questions[:known], min(n, known))


@functools.lru_cache(maxsize=1)
def _sentences() -> list[str]:
    lines = (re.sub(r"\s+", " ", line).strip() for line in re.split(r"(?<=[.!?])\s+", prose()))
    return [line for line in lines if 40 < len(line) < 300 and line[0].isupper()]


TASKS: dict[str, Callable[[Size, random.Random, int, int], Lines]] = {
    "needles": functools.partial(_in_prose, _needles),
    "pairs": _as_many_as_fit,
    "variables": functools.partial(_in_prose, _variables),
}


def document(tokenizer: Any, task: str, length: int, index: int, questions: int = 8) -> Document:
    """The document of a task with this index.

    Parameters
    ----------
    tokenizer : tokenizer of transformers
        A fast one: it must tell which characters a token stands for.
    task : str
        One of `TASKS`.
    length : int
        Most tokens in all.
    index : int
        Documents of different indices are independent.
    questions : int
        1 ... `MOST_QUESTIONS`

    Raises
    ------
    UserError
        When facts and questions do not fit, or are too few for the length, or the tokenizer is not a fast one.
    """
    if not tokenizer.is_fast:
        raise UserError("the model has a slow tokenizer, which does not tell what its tokens stand for")

    @functools.cache
    def size(line: str) -> int:
        return len(tokenizer(f"{line}\n", add_special_tokens=False)["input_ids"])

    lines, asked = TASKS[task](size, random.Random(f"{task} {index}"), length, questions)
    text, spans = "\n".join(lines) + "\n\n", list[tuple[int, int]]()
    end = len(text)
    for question, answer in asked:
        spans.append((len(text) + len(question), len(text) + len(question) + len(answer)))
        text += f"{question}{answer}\n"
    coded = tokenizer(text.removesuffix("\n"), return_offsets_mapping=True, verbose=False)
    ids, where = coded["input_ids"], coded["offset_mapping"]
    if len(asked) < questions or len(ids) > length:
        raise UserError(f"--lengths: {length} tokens are too few for {questions} questions about {task}")
    first = next(i for i, (begin, _) in enumerate(where) if begin >= end)
    found = [[i for i, (begin, to) in enumerate(where) if to > a and begin < b] for a, b in spans]
    answers = tuple((tokens[0], tokens[-1] + 1) for tokens in found)
    return Document(task, length, index, tuple(ids), first, answers)
