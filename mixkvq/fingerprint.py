"""Which architecture a model has, as a short string: what a calibration or a result was made for."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
    "rope_parameters",
    "rope_theta",
    "rope_scaling",
)


def fingerprint(config: Any) -> str:
    """Hash of what shapes keys and queries in a model's configuration.

    Weights take no part: fine-tuned versions of one model have the same fingerprint.

    Parameters
    ----------
    config : transformers.PreTrainedConfig

    Returns
    -------
    str
        ``"<model_type>-<12 hex digits>"``
    """
    text = config.get_text_config(decoder=True)
    known = {name: _field(text, name) for name in _FIELDS}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return f"{known['model_type']}-{digest[:12]}"


def _field(config: Any, name: str) -> Any:
    """A field of a configuration, None if it has none; a list where it differs from layer to layer (Gemma 4)."""
    try:
        return getattr(config, name, None)
    except Exception:
        return [getattr(config.per_layer_config[i], name, None) for i in range(config.num_hidden_layers)]


_SHOWN = 20  # differences: all of those that models can have
_MORE = ("partial_rotary_factor", "rope_local_base_freq", "rotary_dim", "rotary_pct", "qk_rope_head_dim")
"""What else turns keys, in versions that keep it beside ``rope_parameters``."""


@dataclass(frozen=True)
class ModelRecord:
    """Which model filled a cache.

    Attributes
    ----------
    fingerprint : str
    fields : mapping
        What it was made from, RoPE settings among them, and what else turns keys; as JSON gives it back.
    """

    fingerprint: str
    fields: Mapping[str, Any]

    @classmethod
    def of(cls, config: Any) -> ModelRecord:
        """The record of a transformers.PreTrainedConfig."""
        text = config.get_text_config(decoder=True)
        fields = {name: _field(text, name) for name in _FIELDS + _MORE}
        return cls(fingerprint(config), json.loads(json.dumps(fields, sort_keys=True, default=str)))

    def difference(self, other: ModelRecord) -> str:
        """The fields that differ, a few of them with both values; "" if none does."""
        names = [name for name in sorted({*self.fields, *other.fields}) if self._of(name) != other._of(name)]
        shown = [_short(name) + f" {self._of(name)!r:.200} and {other._of(name)!r:.200}" for name in names[:_SHOWN]]
        return "; ".join(shown) + f"; and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)

    def _of(self, name: str) -> Any:
        return self.fields.get(name)


def _short(name: str) -> str:
    """As it is, if it could be a name: a file may have any."""
    return name if name.isidentifier() and len(name) < 80 else f"{name!r:.80}"


def model_name(model: Any) -> str:
    """Last part of where a model was loaded from."""
    return str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2]


def identity(model: Any) -> dict[str, str]:
    """What a measurement is found by: the model's architecture, name without folder, dtype, weights; and our code."""
    if model not in _weights:
        _weights[model] = _weights_of(model)
    return {
        "model": fingerprint(model.config),
        "name": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": _weights[model],
        "code": code_digest(),
    }


_weights: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_SAMPLES = 64


def _weights_of(model: Any) -> str:
    """Hash of some numbers of every parameter."""
    digest = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // _SAMPLES)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


@functools.cache
def code_digest() -> str:
    """Hash of the core and of the reference: what decides the bytes of a record."""
    from . import _core, reference

    digest = hashlib.sha256(Path(_core.__file__).read_bytes())
    for file in sorted(Path(reference.__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
