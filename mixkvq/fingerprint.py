"""Which architecture a model has, as a short string: what a calibration or a result was made for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

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
    known = {name: getattr(text, name, None) for name in _FIELDS}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    return f"{known['model_type']}-{digest[:12]}"


def identity(model: Any) -> dict[str, str]:
    """What a measurement of a model is found by: architecture, name without folder, dtype."""
    return {
        "model": fingerprint(model.config),
        "name": str(getattr(model.config, "_name_or_path", "")).rstrip("/").rpartition("/")[2],
        "dtype": str(model.dtype).removeprefix("torch."),
    }
