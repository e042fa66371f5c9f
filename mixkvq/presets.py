"""The named presets: a system is one record of fields (see `mixkvq.config.MixKVQConfig` for their meaning).

Key patterns are ``{bits: channels}`` per 64 channels. The menus of `default`, `compact` and `near-lossless` hold the
splits that fill their 6, 5 and 8 u32 columns to the last bit, hence one record size: all of them, but two of
`near-lossless` that other head_dims cannot fill. `paper` is the method as published (arXiv 2512.19206, with its
thresholds), `kivi-2` and `kivi-4` are what it is compared with there (arXiv 2402.02750).
"""

from __future__ import annotations

from typing import Any

from .policy.patterns import full_menu

_OURS: dict[str, Any] = {
    "sink_length": 4,
    "residual_length": 128,
    "block_length": 128,
    "allocate": "patterns",
    "pattern_cost": "model",
    "key_range": "search",
    "key_metadata": "e5m3",
    "key_reference": "static",
    "salience": "rms",
    "value_group_size": 0,
    "value_range": "search",
    "value_metadata": "e5m3",
    "value_basis": "hadamard",
}

_PLAIN: dict[str, Any] = {
    "sink_length": 0,
    "residual_length": 128,
    "block_length": 128,
    "pattern_cost": "model",
    "key_range": "minmax",
    "key_group_size": 32,
    "key_metadata": "fp16",
    "key_reference": "none",
    "value_group_size": 32,
    "value_range": "minmax",
    "value_metadata": "fp16",
    "value_basis": "identity",
}

PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        **_OURS,
        "key_patterns": full_menu(6),
        "key_group_size": 64,
        "value_bits": 3,
    },
    "compact": {
        **_OURS,
        "key_patterns": full_menu(5),
        "key_group_size": 128,
        "value_bits": 2,
    },
    "near-lossless": {
        **_OURS,
        "key_patterns": tuple(p for p in full_menu(8) if p not in ({8: 16, 3: 32, 2: 16}, {8: 24, 4: 8, 1: 32})),
        "key_group_size": 64,
        "value_bits": 4,
    },
    "paper": {
        **_PLAIN,
        "allocate": "threshold",
        "thresholds": (1.44, 0.79),
        "salience": "mean_abs",
        "value_bits": 2,
    },
    "kivi-2": {**_PLAIN, "allocate": "patterns", "key_patterns": ({2: 64},), "salience": "none", "value_bits": 2},
    "kivi-4": {**_PLAIN, "allocate": "patterns", "key_patterns": ({4: 64},), "salience": "none", "value_bits": 4},
    "lossless": {
        "sink_length": 0,
        "residual_length": 128,
        "block_length": 128,
        "allocate": "exact",
        "salience": "none",
    },
}
