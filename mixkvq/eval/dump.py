"""Files of real queries, keys and values: written from a model once, read by ``mixkvq eval operator`` without it.

A file is safetensors with, for every layer i in it, ``layers.i.query`` [Q, n, D], ``layers.i.key`` and
``layers.i.value`` [H, n, D], after RoPE, in float32 or float16, and ``layers.i.sinks`` [Q] (float32) where the model
has learned sink logits. The metadata entry ``mixkvq`` is a JSON object:

===============  =============================================================================
``version``      1
``model``        name
``fingerprint``  of the model's configuration, see `mixkvq.fingerprint`
``config``       the configuration of its text decoder, as transformers writes it
``dtype``        of the model
``domain``, ``window``, ``digest``  which text
``tokens``       n
``layers``       ``{"i": {"scaling": ..., "softcap": ... or null, "window": ... or null}}``
===============  =============================================================================
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import UserError
from ..files import whole_file
from ..fingerprint import fingerprint, model_name
from .attention import LayerStates
from .replay import Prefill
from .stream import Emit, layer_progress
from .texts import Window

VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}
_STATES = ("query", "key", "value")


def parse_layers(text: str) -> list[int] | None:
    """``"0,4,8-11"`` as layer indices; None for ``"all"``.

    Raises
    ------
    UserError
        For anything else.
    """
    if text == "all":
        return None
    chosen = set[int]()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(f"--layers is {text!r}, must be all, or indices and ranges such as 0,4,8-11")
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return sorted(chosen)


def observe(model: Any, window: Window, layers: Sequence[int] | None, emit: Emit) -> list[LayerStates]:
    """The attention of a model's layers over a text; `emit` is told of ("layer", (done, total)).

    Raises
    ------
    UserError
        For a layer that the model does not have, or whose attention is of another kind.
    """
    with layer_progress(model, emit):
        try:
            calls = Prefill.record(model, torch.tensor([window.ids])).calls
            have = [call.layer for call in calls]
            wrong = [i for i in layers or () if i not in have]
            if wrong:
                raise UserError(f"--layers names {wrong}, must be among the attention layers {have}")
            return [LayerStates.of_call(call) for call in calls if layers is None or call.layer in layers]
        except ValueError as error:
            raise UserError(f"--model: {error}") from error


def write_dump(
    path: Path,
    model: Any,
    window: Window,
    layers: Sequence[LayerStates],
    dtype: str,
    say: Callable[[str], None],
) -> None:
    """Write a file; it appears under its name when it is complete.

    Parameters
    ----------
    path : Path
    model : causal language model
        Its configuration is kept.
    window : Window
        The text.
    layers : sequence of LayerStates
    dtype : {"float32", "float16"}
    say : callable
        Told the size before anything is written.

    Raises
    ------
    UserError
        For a dtype that cannot hold the numbers, or a file that cannot be written.
    """
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise UserError(f"--dump-dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    tensors = {}
    for states in layers:
        for name in _STATES:
            stored = getattr(states, name).to(DTYPES[dtype]).contiguous()
            if not bool(stored.isfinite().all()):
                raise UserError(f"--dump-dtype is {dtype}, which cannot hold the {name} of layer {states.layer}")
            tensors[f"layers.{states.layer}.{name}"] = stored
        if states.sinks is not None:
            tensors[f"layers.{states.layer}.sinks"] = states.sinks.float().contiguous()
    config = model.config.get_text_config(decoder=True)
    about = {
        "version": VERSION,
        "model": model_name(model),
        "fingerprint": fingerprint(model.config),
        "config": config.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "domain": window.domain,
        "window": window.index,
        "digest": window.digest,
        "tokens": len(window.ids),
        "layers": {str(x.layer): {"scaling": x.scaling, "softcap": x.softcap, "window": x.window} for x in layers},
    }
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    say(f"{len(layers)} layers of {len(window.ids)} tokens in {dtype}: {size / 1e6:,.1f} MB into {path}")
    with whole_file(path) as made:
        save_file(tensors, made, {"mixkvq": json.dumps(about, default=str)})


@dataclass(frozen=True)
class Dump:
    """A file of queries, keys and values. Make it with `open`."""

    path: Path
    about: dict[str, Any]
    """The metadata."""
    digest: str
    """Of the whole file."""
    layers: list[int]
    config: Any
    """transformers configuration."""

    @classmethod
    def open(cls, path: Path) -> Dump:
        """Check a file and its metadata; the layers are read one by one with `read`.

        Raises
        ------
        UserError
            Saying what is wrong with it.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
            with safe_open(path, framework="pt") as tensors:
                metadata, shapes = tensors.metadata() or {}, {k: tensors.get_slice(k) for k in tensors.keys()}  # noqa: SIM118
                shapes = {name: (part.get_shape(), part.get_dtype()) for name, part in shapes.items()}
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
        except SafetensorError as error:
            raise UserError(f"{path} is no complete safetensors file ({error})") from error
        try:
            about = json.loads(metadata["mixkvq"])
            version = about["version"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} was not written by `mixkvq eval dump`: it has no such metadata") from error
        if version != VERSION:
            raise UserError(f"{path} has version {version!r}, must be {VERSION}: dump it again")
        try:
            layers = sorted(int(index) for index in about["layers"])
            for name in ("model", "fingerprint", "digest", "domain"):
                if not isinstance(about[name], str):
                    raise ValueError(f"{name} is no text")
            for index in layers:
                _check_layer(index, about, shapes)
            config = _config(about["config"], layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is no valid dump: {what}") from error
        return cls(path, about, digest, layers, config)

    @property
    def tokens(self) -> int:
        """Tokens of the text."""
        return int(self.about["tokens"])

    @property
    def model(self) -> Any:
        """Stands in for the model where only its configuration is asked for."""
        return SimpleNamespace(config=self.config)

    def read(self, layer: int) -> LayerStates:
        """One layer, widened to float32.

        Raises
        ------
        UserError
            If it holds what is not finite.
        """
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as tensors:
            parts = {name: tensors.get_tensor(f"layers.{layer}.{name}").float() for name in _STATES}
            sinks = f"layers.{layer}.sinks"
            extra = tensors.get_tensor(sinks) if sinks in tensors.keys() else None  # noqa: SIM118
        for name, tensor in parts.items():
            if not bool(tensor.isfinite().all()):
                raise UserError(f"{self.path}: {name} of layer {layer} holds numbers that are not finite")
        fields = self.about["layers"][str(layer)]
        return LayerStates(layer, **parts, **fields, sinks=extra)


def _check_layer(index: int, about: dict[str, Any], shapes: dict[str, Any]) -> None:
    query, key, value = (shapes[f"layers.{index}.{name}"] for name in _STATES)
    (heads, tokens, dim), (kv_heads, *_) = query[0], key[0]
    if key != value or list(key[0]) != [kv_heads, tokens, dim] or query[1] != key[1]:
        raise ValueError(f"queries {query}, keys {key} and values {value} of layer {index} do not fit together")
    if query[1] not in ("F32", "F16"):
        raise ValueError(f"layer {index} is of dtype {query[1]}, must be F32 or F16")
    if not kv_heads or heads % kv_heads or not dim or tokens != about["tokens"] or tokens < 2:
        raise ValueError(f"layer {index} has {heads} query heads, {kv_heads} KV heads, {tokens} tokens, {dim} channels")
    if shapes.get(f"layers.{index}.sinks", ([heads], "F32")) != ([heads], "F32"):
        raise ValueError(f"sinks of layer {index} must be {heads} numbers of dtype F32")
    fields = about["layers"][str(index)]
    if set(fields) != {"scaling", "softcap", "window"}:
        raise ValueError(f"layer {index} must have scaling, softcap and window")
    for name, number in fields.items():
        optional, kind = name != "scaling", int if name == "window" else (int, float)
        if number is None and optional:
            continue
        if not isinstance(number, kind) or isinstance(number, bool) or not math.isfinite(number) or number <= 0:
            raise ValueError(f"{name} of layer {index} is {number!r}, must be a positive number")


def _config(fields: dict[str, Any], layers: list[int]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = fields["model_type"]
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"this version of transformers does not know models of type {kind!r}")
    config = CONFIG_MAPPING[kind].from_dict(fields)
    if not layers or not 0 <= layers[0] <= layers[-1] < config.num_hidden_layers:
        raise ValueError(f"layers {layers} are not among the model's {config.num_hidden_layers}")
    return config
