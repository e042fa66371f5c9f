"""Real text that every Python has: the language documentation in ``pydoc_data.topics``."""

from __future__ import annotations

from typing import Any

from .errors import CliError

TOPICS = ("compound", "execmodel", "import", "exceptions", "debugger")
_END = "The module defines the following functions"  # of the manual of pdb: its introduction comes before, a list follows
INTRODUCTION = "Read this page of the Python documentation.\n\n"
QUESTION = "How do I start the debugger from inside my program?"


def documentation() -> str:
    """The language reference on statements, the execution model, imports and exceptions, and how to use the debugger."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name].strip() for name in TOPICS if name in topics)
    return text[: text.rfind(_END)].rstrip() if _END in text else text


def text_ids(tokenizer: Any, tokens: int) -> list[int]:
    """The last `tokens` token ids of `documentation`.

    Raises
    ------
    CliError
        When the text is shorter than that.
    """
    ids: list[int] = tokenizer(documentation(), add_special_tokens=False)["input_ids"]
    if len(ids) < tokens:
        raise CliError(f"--tokens is {tokens}, must be at most {len(ids)}: that is all the text there is")
    return ids[len(ids) - tokens :]


def excerpt(tokenizer: Any, tokens: int) -> str:
    """The end of `documentation`, at most `tokens` tokens long, from the beginning of a paragraph on."""
    text: str = tokenizer.decode(text_ids(tokenizer, tokens))
    return text.split("\n\n", 1)[-1]


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """Token ids [1, n] of a conversation, with the model's chat template if it has one, else the contents alone."""
    if tokenizer.chat_template:
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return tokenizer.apply_chat_template(messages, **options)["input_ids"]
    return tokenizer("\n\n".join(m["content"] for m in messages), return_tensors="pt")["input_ids"]


def question_ids(tokenizer: Any, tokens: int) -> Any:
    """Token ids [1, n] of the demo's prompt: about `tokens` tokens of documentation and a question about it."""
    content = f"{INTRODUCTION}{excerpt(tokenizer, tokens)}\n\n{QUESTION}"
    return chat_ids(tokenizer, [{"role": "user", "content": content}])
