"""What the model reads: windows of real text that every Python installation has, or of the user's files.

Domains: ``prose`` (the language reference, `pydoc_data.topics`), ``code`` (sources of the standard library), ``maths``
(conversations of made problems and worked answers, in the model's chat template). A path to a text file is a domain of
its own; a ``.jsonl`` file of questions and answers becomes conversations like ``maths``.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError
from .problems import Problem, made_problems, read_problems, read_text

DOMAINS = ("prose", "code", "maths")
_MODULES = (
    "argparse", "heapq", "textwrap", "statistics", "fractions", "configparser", "shlex", "difflib", "csv", "sched",
    "bisect", "calendar", "contextlib", "copy", "dataclasses", "functools", "glob", "queue", "random", "tempfile",
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """A stretch of tokens from one domain."""

    domain: str
    index: int
    ids: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Says which tokens these are."""
        return hashlib.sha256(repr(self.ids).encode()).hexdigest()[:12]


def prose() -> str:
    """The language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(text.strip() for _, text in sorted(topics.items()))


def _code() -> str:
    parts = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and Path(spec.origin).suffix == ".py":
            parts.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n\n".join(parts)


def chat(tokenizer: Any, problems: list[Problem]) -> list[int]:
    """Token ids of a conversation of these problems: in the chat template, or as plain questions and answers."""
    if tokenizer.chat_template:
        messages = [
            {"role": role, "content": text}
            for problem in problems
            for role, text in (("user", problem.question), ("assistant", problem.answer))
        ]
        ids: list[int] = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        return ids
    text = "\n\n".join(f"Question: {p.question}\nAnswer: {p.answer}" for p in problems)
    return list(tokenizer(text)["input_ids"])


def _chats(tokenizer: Any, problems: list[Problem], domain: str, count: int, length: int) -> list[Window]:
    share, windows = len(problems) // count, []
    for index in range(count):
        ids = chat(tokenizer, problems[index * share : (index + 1) * share])
        if len(ids) < length:
            raise UserError(f"{domain} has {len(ids)} tokens per window for {count} windows, must have {length}")
        windows.append(Window(domain, index, tuple(ids[:length])))
    return windows


def _last_chats(tokenizer: Any, problems: list[Problem], domain: str, count: int, length: int) -> list[Window]:
    """Conversations of the last problems, backwards; none is in two windows."""
    windows, left = list[Window](), problems[::-1]
    for index in range(count):
        used, ids = 0, list[int]()
        while len(ids) < length:
            if used == len(left):
                raise UserError(f"{domain} has too few problems for {count} windows of {length} tokens")
            used += 1
            ids = chat(tokenizer, left[:used])
        windows.append(Window(domain, index, tuple(ids[:length])))
        left = left[used:]
    return windows


def windows(tokenizer: Any, domain: str, count: int, length: int, *, last: bool = False) -> list[Window]:
    """``count`` stretches of ``length`` tokens, spread evenly over a domain, or its last ones.

    The spread ones begin at multiples of a ``count``-th of the domain, so that n of them share no token with the last m
    while the domain has n * (m + 1) * length tokens.

    Parameters
    ----------
    tokenizer : tokenizer of transformers
    domain : str
        One of `DOMAINS`, or the path of a text or ``.jsonl`` file.
    count, length : int
    last : bool
        The last tokens or problems of the domain; of ``maths``, which has no end, problems of another seed.

    Raises
    ------
    UserError
        For an unknown domain, or when there is too little text.
    """
    if domain == "maths":
        # about 100 tokens a problem; some more, since tokenizers differ
        return _chats(tokenizer, made_problems(count * max(8, length // 40), int(last)), domain, count, length)
    if domain.endswith(".jsonl"):
        return (_last_chats if last else _chats)(tokenizer, read_problems(Path(domain)), domain, count, length)
    if domain == "prose":
        text = prose()
    elif domain == "code":
        text = _code()
    elif Path(domain).is_file():
        text = read_text(Path(domain))
    else:
        raise UserError(f"--domains: {domain!r} must be one of {', '.join(DOMAINS)}, or the path of a text file")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None or not _adds_bos(tokenizer) else [tokenizer.bos_token_id]
    body = length - len(begin)
    if len(ids) < count * body:
        raise UserError(f"{domain} has {len(ids)} tokens, must have {count * body} for {count} windows")
    first, step = (len(ids) - count * body, body) if last else (0, len(ids) // count)
    parts = [ids[first + i * step : first + i * step + body] for i in range(count)]
    return [Window(domain, i, (*begin, *part)) for i, part in enumerate(parts)]


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token before every text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids and ids[0] == tokenizer.bos_token_id)
