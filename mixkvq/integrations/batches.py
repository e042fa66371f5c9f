"""Texts for a batch of prompts, each batch with one fresh cache: what every worker runs, whatever starts it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..cache import MixKVQCache
from ..compat import cache_argument
from ..config import MixKVQConfig

OURS = (
    "input_ids",
    "inputs",
    "attention_mask",
    "cache",
    "past_key_values",
    "cache_implementation",
    "use_cache",
    "max_length",
    "max_new_tokens",
    "num_return_sequences",
    "return_dict_in_generate",
    "generation_config",
)
"""Arguments of `generate` that a worker sets itself, or that would change what comes out."""

_AUTO: Any = AutoModelForCausalLM

DTYPES = ("auto", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class BatchSettings:
    """How a worker answers; the fields are explained in `mixkvq.integrations.ray.generate`."""

    model: str
    preset: str | MixKVQConfig = "default"
    dtype: str = "auto"
    max_new_tokens: int = 256
    max_prompt_tokens: int | None = None
    apply_chat_template: bool = False
    seed: int = 0
    generate_options: Mapping[str, Any] = field(default_factory=dict)
    cache_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise TypeError(f"model is {self.model!r}, must be a folder that every node can read, or a name on a hub")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        check_count("max_new_tokens", self.max_new_tokens)
        if self.max_prompt_tokens is not None:
            check_count("max_prompt_tokens", self.max_prompt_tokens)
        if taken := sorted(set(self.generate_options) & set(OURS)):
            raise ValueError(f"generate_options has {', '.join(taken)}, must leave {', '.join(OURS)} alone")
        if "config" in self.cache_options or "ddp_cache_data" in self.cache_options:
            raise ValueError("cache_options must leave config and ddp_cache_data alone: every batch has a fresh cache")

    def model_config(self) -> Any:
        """The model's configuration.

        Raises
        ------
        ValueError
            If there is no such model.
        """
        try:
            return AutoConfig.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model is {self.model!r}, must be a folder with config.json that every node can read, or a name on a "
                f"model hub ({first_line(error)})"
            ) from error

    def prompt_limit(self, config: Any) -> int:
        """The most tokens that a prompt may have: what was asked for, else what the model's positions leave.

        Raises
        ------
        ValueError
            If the model has fewer positions, or does not say how many and nothing was asked for.
        """
        positions: int | None = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        limit = self.max_prompt_tokens
        if limit is None:
            if positions is None:
                raise ValueError("max_prompt_tokens is None, must be an int: the model does not say what it can take")
            limit = positions - self.max_new_tokens
        if positions is not None and not 1 <= limit <= positions - self.max_new_tokens:
            raise ValueError(
                f"max_prompt_tokens is {self.max_prompt_tokens} and max_new_tokens {self.max_new_tokens}, their sum "
                f"must be at most {positions}, the positions of the model, with a prompt of at least 1"
            )
        return limit

    def fresh_cache(self, config: Any) -> MixKVQCache:
        """An empty cache for one batch."""
        return MixKVQCache(self.preset, config=config, **self.cache_options)


def check_count(name: str, value: Any) -> None:
    """Refuse what is no integer of at least 1.

    Raises
    ------
    ValueError
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}, must be an int of at least 1")


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def weight_bytes(config: Any, dtype: str) -> int:
    """Bytes of a model's weights, shared ones counted once, before any of them is loaded.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
    dtype : {"auto", "float32", "float16", "bfloat16"}
        "auto" is what the configuration says, else float32.
    """
    wanted = getattr(config, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        model = _AUTO.from_config(config, dtype=wanted)
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Answer:
    """What came of one prompt.

    Attributes
    ----------
    text : str
        What the model wrote, without the prompt and without special tokens.
    prompt_tokens, new_tokens : int
        The end token, if it came, counts as new.
    """

    text: str
    prompt_tokens: int
    new_tokens: int


class BatchGenerator:
    """A model that answers batch after batch, on the CPU.

    Parameters
    ----------
    settings : BatchSettings

    Raises
    ------
    ValueError
        If there is no such model, or it has fewer positions than `settings` needs.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self.settings = settings
        config = settings.model_config()
        self.limit = settings.prompt_limit(config)
        self.model = _AUTO.from_pretrained(settings.model, dtype=settings.dtype).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.model, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if settings.apply_chat_template and not self.tokenizer.chat_template:
            raise ValueError(f"apply_chat_template is True, but the tokenizer of {settings.model!r} has no template")
        ends = settings.generate_options.get("eos_token_id", self.model.generation_config.eos_token_id)
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])

    def encode(self, prompts: Sequence[Any]) -> list[list[int] | str]:
        """Token ids of every prompt, or what is wrong with it: no string, empty, or too many tokens."""
        return [self._encode(prompt) for prompt in prompts]

    def _encode(self, prompt: Any) -> list[int] | str:
        if not isinstance(prompt, str):
            return f"is a {type(prompt).__name__}, must be a string"
        chat = self.settings.apply_chat_template
        text = prompt
        if chat and prompt:
            messages = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not chat)["input_ids"] if prompt else []
        if not ids:
            return "is empty, must have at least one token"
        if len(ids) > self.limit:
            return f"has {len(ids)} tokens, must have at most {self.limit}"
        return ids

    @torch.inference_mode()
    def answer(self, encoded: Sequence[list[int]]) -> tuple[list[Answer], int]:
        """Continue the prompts of one batch.

        Parameters
        ----------
        encoded : sequence of length B
            Token ids, as `encode` gives them.

        Returns
        -------
        answers : list of Answer
            B of them, none of which depends on the others but for rounding.
        cache_bytes : int
            What the batch's cache held at the end (``report().nbytes``).
        """
        if not encoded:
            return [], 0
        settings = self.settings
        inputs = self.tokenizer.pad({"input_ids": list(encoded)}, padding=True, return_tensors="pt")
        cache = settings.fresh_cache(self.model.config)
        torch.manual_seed(_seed(settings.seed, encoded))
        options = {
            "do_sample": False,
            "pad_token_id": self.tokenizer.pad_token_id,
            **settings.generate_options,
            "max_new_tokens": settings.max_new_tokens,
        }
        out = self.model.generate(**inputs, **cache_argument(cache), **options)
        rows = [self._until_end(row) for row in out[:, inputs["input_ids"].shape[1] :].tolist()]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        answers = [Answer(t, len(p), len(r)) for t, p, r in zip(texts, encoded, rows, strict=True)]
        return answers, cache.report().nbytes

    def _until_end(self, ids: list[int]) -> list[int]:
        """The ids up to the first end token, which other rows of the batch may have outlasted."""
        return next((ids[: i + 1] for i, token in enumerate(ids) if token in self._ends), ids)


def _seed(seed: int, encoded: Sequence[list[int]]) -> int:
    """A seed that depends on the prompts of the batch alone, so that a batch done again is sampled the same."""
    return int.from_bytes(hashlib.sha256(repr((seed, *encoded)).encode()).digest()[:7], "big")
