"""The golden records: what they are made from, and the command that writes them.

``python tests/golden/make.py`` packs the inputs of `CASES` with the oracle into ``NAME.bin`` (the records of a head,
one after the other, head after head) and writes ``golden.json`` (reference, raised scales, kinds, SHA-256 of the
unpacked float32 keys and values). The files pin version 1 of docs/format.md: they change only together with the version
byte.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from inputs import ramp  # noqa: E402

from mixkvq import reference  # noqa: E402
from mixkvq.config import BlockCodec  # noqa: E402
from mixkvq.reference import numbers  # noqa: E402

BASE: dict[str, Any] = {
    "dtype": "float32",
    "allocate": "patterns",
    "key_group": 32,
    "key_metadata": "e5m3",
    "key_range": "search",
    "key_reference": True,
    "value_bits": 3,
    "value_metadata": "e5m3",
    "value_range": "search",
    "value_rotation": True,
    "pattern_cost": "model",
    "patterns": (),
    "threshold_high": 3.0,
    "threshold_low": 1.5,
}
ALL_TIERS = ((8, 12, 20, 12, 4, 8),)
PLAIN = {"key_reference": False, "value_rotation": False}
HALF, BRAIN = {"dtype": "float16"}, {"dtype": "bfloat16"}
EXACT = {"allocate": "exact"}

# name: (head_dim, block_length, blocks, other fields)
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "every-tier": (64, 64, 1, {"patterns": ALL_TIERS}),
    "every-tier-fp16": (64, 64, 1, {**BRAIN, "patterns": ALL_TIERS, "key_metadata": "fp16"}),
    "every-tier-minmax": (
        64,
        64,
        1,
        {**HALF, **PLAIN, "patterns": ALL_TIERS, "key_range": "minmax", "value_bits": 2, "value_range": "minmax"},
    ),
    "minmax-fp16": (
        64,
        64,
        1,
        {
            **PLAIN,
            "patterns": ((0, 64, 0, 0, 0, 0),),
            "key_metadata": "fp16",
            "key_range": "minmax",
            "value_bits": 2,
            "value_group": 32,
            "value_metadata": "fp16",
            "value_range": "minmax",
        },
    ),
    "menu-model": (64, 32, 2, {"patterns": ((0, 0, 64, 0, 0, 0), (8, 8, 24, 24, 0, 0), (20, 16, 0, 24, 4, 0))}),
    "menu-measured": (
        80,
        32,
        1,
        {
            "patterns": ((0, 0, 80, 0, 0, 0), (10, 10, 30, 30, 0, 0), (24, 22, 0, 30, 4, 0)),
            "pattern_cost": "measured",
            "value_bits": 4,
        },
    ),
    "menu-measured-minmax": (
        24,
        32,
        1,
        {
            **HALF,
            **PLAIN,
            "patterns": ((0, 0, 24, 0, 0, 0), (4, 3, 7, 10, 0, 0)),
            "pattern_cost": "measured",
            "key_range": "minmax",
            "key_metadata": "fp16",
        },
    ),
    "threshold": (40, 32, 1, {**BRAIN, "allocate": "threshold"}),
    "threshold-fp32": (40, 32, 1, {"allocate": "threshold", "value_bits": 0, "value_rotation": False}),
    "values-1": (48, 32, 1, {"patterns": ((48, 0, 0, 0, 0, 0),), "value_bits": 1}),
    "values-1-fp16": (
        48,
        64,
        1,
        {**PLAIN, "patterns": ((0, 0, 0, 48, 0, 0),), "value_bits": 1, "value_metadata": "fp16", "value_group": 32},
    ),
    "values-2": (96, 32, 1, {"patterns": ((1, 35, 40, 20, 0, 0),), "value_bits": 2}),
    "values-3-fp16": (
        16,
        64,
        1,
        {"patterns": ((0, 0, 16, 0, 0, 0),), "value_metadata": "fp16", "value_range": "minmax"},
    ),
    "values-4": (8, 64, 1, {"patterns": ((1, 2, 2, 2, 1, 0),), "value_bits": 4}),
    "values-8": (32, 32, 1, {**HALF, "patterns": ((0, 0, 0, 0, 32, 0),), "value_bits": 8}),
    "values-exact": (
        32,
        32,
        1,
        {**BRAIN, "patterns": ((0, 0, 0, 0, 0, 32),), "value_bits": 0, "value_rotation": False},
    ),
    "exact-float32": (8, 7, 1, EXACT),
    "exact-float16": (8, 7, 1, {**EXACT, **HALF}),
    "exact-bfloat16": (8, 7, 1, {**EXACT, **BRAIN}),
    "escaped": (16, 32, 3, {**HALF, "patterns": ((0, 16, 0, 0, 0, 0),)}),
    "raised": (16, 32, 2, {**PLAIN, "patterns": ((0, 12, 0, 0, 4, 0),)}),
    "budget": (64, 32, 2, {"allocate": "budget", "budget_columns": 5, "value_bits": 2}),
    "budget-measured": (
        40,
        32,
        2,
        {**HALF, **PLAIN, "allocate": "budget", "budget_columns": 4, "pattern_cost": "measured"},
    ),
    "layer": (32, 64, 2, {**BRAIN, "allocate": "layer", "budget_columns": 3}),
}
HEADS = {"layer": 3}
"""KV heads of a case, where there are several: they share a budget."""


def case(name: str) -> tuple[BlockCodec, np.ndarray, np.ndarray, np.ndarray]:
    """Codec, k and v [H, n, D] in the codec's dtype, and importance [H, D] of a case."""
    dim, length, blocks, fields = CASES[name]
    codec = BlockCodec(**{"head_dim": dim, "block_length": length, "value_group": dim, **BASE, **fields})
    heads, seed = HEADS.get(name, 1), list(CASES).index(name)
    tokens, dim = blocks * length, heads * dim
    width = np.array([(1, 2, 4, 8)[d * 5 % 4] for d in range(dim)], np.float32) / 4
    k = ramp(tokens, dim, seed) * width + np.float32(3) * ramp(1, dim, seed + 100)
    v = ramp(tokens, dim, seed + 200) * ramp(tokens, 1, seed + 300)
    if name == "escaped":  # the first block holds a NaN in K, the last an infinity in V
        k[5, 3], v[-1, -1] = np.nan, -np.inf
    if name == "raised":
        k[:, 2], k[:32, 9], v[7] = 100, -0.0, 55
    weight = np.abs(ramp(1, dim, seed + 400)[0]) / 4
    if name == "layer":  # the last head's second block is exact and takes no part
        k[-1, -1] = np.inf
    k, v = (np.ascontiguousarray(x.reshape(tokens, heads, -1).swapaxes(0, 1)) for x in (k, v))
    return codec, numbers.narrow(k, codec.dtype), numbers.narrow(v, codec.dtype), weight.reshape(heads, -1)


def digest(records: list[list[bytes]], mu: list[np.ndarray | None]) -> str:
    """SHA-256 of the unpacked keys and values of all heads."""
    pairs = [(record, mu[head]) for head, blocks in enumerate(records) for record in blocks]
    parts = [x.tobytes() for record, known in pairs for x in reference.unpack(record, known)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    facts = {}
    for name in CASES:
        codec, k, v, weight = case(name)
        records, mu, raised = reference.pack_heads(codec, k, v, weight)
        flat = [record for blocks in records for record in blocks]
        (HERE / f"{name}.bin").write_bytes(b"".join(flat))
        facts[name] = {
            "mu": None if mu[0] is None else [n for head in mu for n in head.view(np.uint16).tolist()],
            "raised": [n for blocks in raised for n in blocks],
            "exact": [reference.parse(record).exact for record in flat],
            "counts": [reference.parse(record).counts for record in flat],
            "unpacked": digest(records, mu),
        }
    lines = (f"{json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items())
    (HERE / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
