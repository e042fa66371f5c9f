"""Real text that every Python has: the language documentation in ``pydoc_data.topics``."""

from __future__ import annotations

from typing import Any

from ..errors import UserError

# One after the other they read like a chapter; the first is the manual of pdb, 5200 tokens of SmolLM2 on Python 3.11.
TOPICS = ("debugger", "execmodel", "import", "try", "with", "async", "exceptions", "compound", "specialnames")
INTRODUCTION = "Read this page of the Python documentation.\n\n"
QUESTION = "How do I run a script under the debugger from the command line?"


def documentation() -> str:
    """The documentation topics `TOPICS`, joined."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS if name in topics)


def text_ids(tokenizer: Any, tokens: int) -> list[int]:
    """The first `tokens` token ids of `documentation`.

    Raises
    ------
    UserError
        When the text is shorter than that.
    """
    ids: list[int] = tokenizer(documentation(), add_special_tokens=False)["input_ids"][:tokens]
    if len(ids) < tokens:
        raise UserError(f"--tokens is {tokens}, must be at most {len(ids)}: that is all the text there is")
    return ids


def excerpt(tokenizer: Any, tokens: int) -> str:
    """The beginning of `documentation`, at most `tokens` tokens long, cut between paragraphs."""
    text: str = tokenizer.decode(text_ids(tokenizer, tokens))
    return text.rsplit("\n\n", 1)[0]


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
