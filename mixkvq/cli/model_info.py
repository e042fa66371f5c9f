"""``mixkvq info --model DIR``: which layers of a model are packed, why the others are not, and what that saves.

The model reads a page of documentation and decodes a few tokens, once with transformers' own cache and once with ours.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import MixKVQCache
from ..compat import cache_argument
from ..config import MixKVQConfig
from ..errors import UserError
from ..eval.memory import cache_nbytes
from ..eval.models import DTYPES, load, quiet
from ..report import LayerReport, Report
from ..shapes import model_class
from .text import text_ids

NEW_TOKENS = 8
_TOKENS = 512
_HEARD: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "input_features": lambda config: (config.num_mel_bins, 2 * config.max_source_positions),  # a spectrogram
    "input_values": lambda config: (getattr(config, "sampling_rate", 16000),),  # a second of samples
}
"""Shape of what the encoder of a speech model takes, by the name of the argument."""
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_target_positions",
    "max_decoder_position_embeddings",
    "max_encoder_position_embeddings",
)
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "tf_model.h5", "model.ckpt*")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab*", "*.tiktoken", "spiece.model", "*.spm", "tekken.json")


@dataclass(frozen=True)
class ModelInfoOptions:
    """Options of the command; explained in `mixkvq.cli.info`."""

    model: str
    tokens: int | None = None
    preset: str = "default"
    attn: str | None = None
    dtype: str = "auto"

    def __post_init__(self) -> None:
        try:
            MixKVQConfig.preset(self.preset)
        except ValueError as error:
            raise UserError(f"--preset: {error}") from error
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.tokens is not None and self.tokens < 1:
            raise UserError(f"--tokens is {self.tokens}, must be at least 1")


@dataclass(frozen=True)
class ModelInfo:
    """What was found; `facts` for JSON, ``print`` it for people."""

    options: ModelInfoOptions
    architecture: str
    attention: str
    dtype: str
    weights: str
    prompt: str
    tokens: int
    report: Report
    stock_nbytes: int

    @property
    def summary(self) -> str:
        """The closing line."""
        paths = [layer.path for layer in self.report.layers]
        bits = f"; records at {self.report.true_bits:.2f} bits" if self.report.true_bits else ""
        counts = ", ".join(f"{paths.count(path)} {path}" for path in ("dequantized", "native") if path in paths)
        return (
            f"{paths.count('packed')} of {len(paths)} layers packed{f' ({counts})' * bool(counts)}: "
            f"{self.report.nbytes:,} bytes for {self.tokens} tokens, DynamicCache {self.stock_nbytes:,} in "
            f"{self.dtype} ({self.report.nbytes / self.stock_nbytes:.3f} of it{bits})"
        )

    def facts(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "model": self.options.model,
            "architecture": self.architecture,
            "attention": self.attention,
            "dtype": self.dtype,
            "weights": self.weights,
            "prompt": self.prompt,
            "tokens": self.tokens,
            "preset": self.options.preset,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "layers": [_layer_facts(layer) for layer in self.report.layers],
            "packed_layers": sum(layer.path == "packed" for layer in self.report.layers),
            "nbytes": self.report.nbytes,
            "dynamic_cache_nbytes": self.stock_nbytes,
            "true_bits": self.report.true_bits,
            "summary": self.summary,
        }

    def __str__(self) -> str:
        head = (
            f"{self.architecture} in {self.dtype}, {self.attention} attention, {self.weights}; {self.prompt}; "
            f"transformers {transformers.__version__}"
        )
        return f"{head}\n\n{self.report}\n\n{self.summary}"


def _layer_facts(layer: LayerReport) -> dict[str, Any]:
    names = ("index", "path", "reason", "remedy", "tokens", "nbytes", "true_bits", "dequantizations")
    facts = {name: getattr(layer, name) for name in names}
    return facts | {"decoded_for": None if layer.decoded_for is None else str(layer.decoded_for)}


def inspect_model(options: ModelInfoOptions) -> ModelInfo:
    """Run a model with both caches.

    Raises
    ------
    UserError
        When there is no such model, it does not fit into memory, or cannot generate from text.
    """
    model, tokenizer, weights = _load(options)
    if options.attn is not None:
        try:
            model.set_attn_implementation(options.attn)
        except (ValueError, ImportError, KeyError) as error:
            raise UserError(f"--attn is {options.attn!r}: {_first_line(error)}") from error
    ids, prompt = _prompt(model, tokenizer, options)
    stock = transformers.DynamicCache(config=model.config.get_text_config(decoder=True))
    try:
        _generate(model, ids, stock)
    except Exception as error:
        raise _failure(options, "it cannot continue text with transformers alone", error) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "MixKVQCache: ")  # the report says it
            ours = MixKVQCache(options.preset, config=model.config)
            _generate(model, ids, ours)
    except Exception as error:
        problem = "it continues text with DynamicCache but not with MixKVQCache, which is a bug of mixkvq"
        raise _failure(options, problem, error) from error
    report = ours.report()
    return ModelInfo(
        options=options,
        architecture=type(model).__name__,
        attention=model.config.get_text_config(decoder=True)._attn_implementation,
        dtype=str(model.dtype).removeprefix("torch."),
        weights=weights,
        prompt=f"{prompt}, after noise for the encoder" if model.main_input_name in _HEARD else prompt,
        tokens=max(layer.tokens for layer in report.layers) or ids.shape[1] + NEW_TOKENS - 1,  # linear layers: 0
        report=report,
        stock_nbytes=cache_nbytes(stock),
    )


def _generate(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Read the prompt and decode `NEW_TOKENS`."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs = _encoded(model, ids) | {"decoder_input_ids": ids}
        cache = transformers.EncoderDecoderCache(cache, transformers.DynamicCache())
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    with torch.inference_mode():
        model.generate(**inputs, **cache_argument(cache), **options)


def _encoded(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the encoder reads: the prompt, or noise if it hears."""
    name = model.main_input_name
    if name not in _HEARD:
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    noise = torch.randn(1, *_HEARD[name](model.config), generator=torch.Generator().manual_seed(0))
    return {name: noise.to(model.dtype)}


def _prompt(model: Any, tokenizer: Any, options: ModelInfoOptions) -> tuple[torch.Tensor, str]:
    """Token ids [1, n], and what they are."""
    wanted = options.tokens
    config = model.config.get_text_config(decoder=True)
    limit = min((limit for name in _POSITIONS if isinstance(limit := getattr(config, name, None), int)), default=None)
    room = None if limit is None else limit - NEW_TOKENS
    if room is not None and room < 1:
        needed = f"must have more than the {NEW_TOKENS} that are decoded"
        raise UserError(f"--model is {options.model!r}, a model with {limit} positions, {needed}")
    if room is not None and wanted is not None and wanted > room:
        raise UserError(f"--tokens is {wanted}, must be at most {room}: the model has {limit} positions")
    tokens = wanted if wanted is not None else min(_TOKENS, _TOKENS if room is None else room)
    if tokenizer is not None:
        text = text_ids(tokenizer, tokens)
        if max(text) < config.vocab_size:
            return torch.tensor([text]), f"{tokens} tokens of the Python documentation"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
    return ids, f"{tokens} random tokens (no tokenizer that fits)"


# ---- loading -------------------------------------------------------------------------------------------------------
def _load(options: ModelInfoOptions) -> tuple[Any, Any, str]:
    """Model, tokenizer or None, and where the weights are from."""
    folder = Path(options.model)
    if not folder.is_dir():
        model, tokenizer = load(options.model, options.dtype)
        return model, tokenizer, "weights of the checkpoint"
    quiet()
    if not (folder / "config.json").is_file():
        raise UserError(f"--model is {options.model!r}, which has no config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        auto = model_class(config)
        if any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            model = auto.from_pretrained(folder, dtype=options.dtype)
            weights = "weights of the folder"
        else:
            model = _random(auto, config, options)
            weights = "RANDOM weights (the folder has none)"
    except (OSError, ValueError, KeyError) as error:
        needed = "must be a folder with a language model that transformers knows"
        raise UserError(f"--model is {options.model!r}, {needed} ({_first_line(error)})") from error
    return model.eval(), _tokenizer(folder), weights


def _tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder or None: random tokens do, and the output says so."""
    if not any(next(folder.glob(pattern), None) for pattern in _VOCABULARIES):
        return None  # transformers would make up an empty one
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:  # made for another version, or by a package that is not installed
        return None


def _random(auto: Any, config: Any, options: ModelInfoOptions) -> Any:
    """A model of this configuration with random weights, if it fits into memory."""
    name = options.dtype
    if name == "auto":
        name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    dtype: torch.dtype = getattr(torch, name)
    make = auto.from_config if hasattr(auto, "from_config") else auto._from_config
    with torch.device("meta"):
        needed = dtype.itemsize * sum(p.numel() for p in make(config).parameters())
    free = available_memory()
    if free is not None and needed > 0.8 * free:
        raise UserError(
            f"--model is {options.model!r}, a configuration without weights: random ones in {name} would take "
            f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; lower its num_hidden_layers"
        )
    torch.manual_seed(0)
    return make(config, dtype=dtype)


def available_memory() -> int | None:
    """Bytes that a process may still take, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def _failure(options: ModelInfoOptions, problem: str, error: Exception) -> UserError:
    return UserError(f"--model is {options.model!r}: {problem} ({type(error).__name__}: {_first_line(error)})")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
