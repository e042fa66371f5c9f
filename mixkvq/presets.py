"""The named presets: a system is one record of fields (see `mixkvq.config.MixKVQConfig` for their meaning).

Key patterns are ``{bits: channels}`` per 64 channels. The menus of `default`, `compact` and `near-lossless` hold the
splits that fill their 6, 5 and 8 u32 columns to the last bit, hence one record size: all of them, but two of
`near-lossless` that other head_dims cannot fill. `paper` is the method as published (arXiv 2512.19206, with its
thresholds), `kivi-2` and `kivi-4` are what it is compared with there (arXiv 2402.02750).
"""

from __future__ import annotations

from typing import Any

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
        "key_patterns": (
            {3: 64},
            {4: 16, 3: 32, 2: 16},
            {4: 24, 3: 24, 2: 8, 1: 8},
            {4: 32, 3: 16, 1: 16},
            {4: 32, 2: 32},
            {8: 4, 4: 8, 3: 28, 2: 20, 1: 4},
            {8: 4, 4: 16, 3: 20, 2: 12, 1: 12},
            {8: 4, 4: 24, 3: 12, 2: 4, 1: 20},
            {8: 8, 3: 24, 2: 24, 1: 8},
            {8: 8, 4: 8, 3: 16, 2: 16, 1: 16},
            {8: 8, 4: 8, 2: 48},
            {8: 8, 4: 16, 3: 8, 2: 8, 1: 24},
            {8: 8, 4: 24, 1: 32},
            {8: 12, 3: 12, 2: 20, 1: 20},
            {8: 12, 4: 8, 3: 4, 2: 12, 1: 28},
            {8: 16, 2: 16, 1: 32},
        ),
        "key_group_size": 64,
        "value_bits": 3,
    },
    "compact": {
        **_OURS,
        "key_patterns": (
            {3: 48, 1: 16},
            {3: 32, 2: 32},
            {4: 8, 3: 24, 2: 24, 1: 8},
            {4: 16, 3: 16, 2: 16, 1: 16},
            {4: 16, 2: 48},
            {4: 24, 3: 8, 2: 8, 1: 24},
            {4: 32, 1: 32},
            {8: 4, 3: 20, 2: 28, 1: 12},
            {8: 4, 4: 8, 3: 12, 2: 20, 1: 20},
            {8: 4, 4: 16, 3: 4, 2: 12, 1: 28},
            {8: 8, 3: 8, 2: 24, 1: 24},
            {8: 8, 4: 8, 2: 16, 1: 32},
        ),
        "key_group_size": 128,
        "value_bits": 2,
    },
    "near-lossless": {
        **_OURS,
        "key_patterns": (
            {4: 64},
            {8: 8, 4: 24, 3: 32},
            {8: 8, 4: 40, 2: 16},
            {8: 12, 4: 16, 3: 28, 2: 4, 1: 4},
            {8: 16, 4: 8, 3: 24, 2: 8, 1: 8},
            {8: 16, 4: 16, 3: 16, 1: 16},
            {8: 16, 4: 16, 2: 32},
            {8: 20, 3: 20, 2: 12, 1: 12},
            {8: 20, 4: 8, 3: 12, 2: 4, 1: 20},
            {8: 24, 3: 8, 2: 8, 1: 24},
        ),
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
