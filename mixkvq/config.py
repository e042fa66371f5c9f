"""`MixKVQConfig`: every choice of the codec and the cache as one frozen, JSON-able record."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from .policy.patterns import TIER_BITS, scale_menu
from .presets import PRESETS

MAX_HEAD_DIM = 256
MAX_CODED_BLOCK = 1024
MAX_EXACT_BLOCK = 65535
MAX_PATTERNS = 16

ALLOCATE = ("patterns", "threshold", "exact", "budget", "layer")
"""Ways to choose the bits of key channels, in the order of ``mkvq_allocate``."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "allocate": ALLOCATE,
    "pattern_cost": ("model", "measured"),
    "key_range": ("minmax", "search", "search-mse"),
    "key_metadata": ("e5m3", "fp16"),
    "key_reference": ("static", "none"),
    "salience": ("rms", "mean_abs", "none"),
    "value_bits": (1, 2, 3, 4, 8, 16),
    "value_range": ("minmax", "search", "search-mse"),
    "value_metadata": ("e5m3", "fp16"),
    "value_basis": ("hadamard", "identity"),
}


def _close(name: object, known: Any) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"known: {', '.join(known)}{hint}"


def list_presets() -> list[str]:
    """Names that `MixKVQConfig.preset` and ``MixKVQCache(...)`` accept."""
    return list(PRESETS)


@dataclass(frozen=True)
class BlockCodec:
    """How one block of one layer is coded: a `MixKVQConfig` applied to a head_dim and a dtype.

    The field names and meanings are those of ``mkvq_codec`` in ``csrc/mixkvq.h``; patterns hold channels per tier id
    (1, 2, 3, 4, 8 bits, exact) and sum to ``head_dim``.
    """

    head_dim: int
    block_length: int
    dtype: str
    """``"float32"``, ``"float16"`` or ``"bfloat16"``: of K, V, exact channels and exact records."""
    allocate: str
    key_group: int
    key_metadata: str
    key_range: str
    key_reference: bool
    value_bits: int
    """0 means exact."""
    value_group: int
    value_metadata: str
    value_range: str
    value_rotation: bool
    pattern_cost: str
    patterns: tuple[tuple[int, ...], ...]
    threshold_high: float
    threshold_low: float
    budget_columns: int = 0
    """Key columns per head that ``allocate="budget"`` and ``"layer"`` may fill."""


@dataclass(frozen=True)
class MixKVQConfig:
    """All fields of a preset. Build one with `preset`, with the constructor, or with `from_json`.

    Parameters
    ----------
    sink_length : int
        First tokens of every row kept exact for ever.
    residual_length : int
        R: newest tokens kept exact; when the window reaches R tokens its oldest block is packed. At least
        ``block_length``.
    block_length : int
        Tokens packed at once. Coded blocks: a multiple of 32 and of ``key_group_size``, at most 1024.
    allocate : {"patterns", "threshold", "exact", "budget", "layer"}
        How key channels get their bits: by the best pattern of a menu, by thresholds on A_d (arXiv 2512.19206,
        section 4), all exact, keys and values (``lossless``), by the best split that fits ``key_budget`` in every
        head, or in all heads of a layer together (docs/format.md section 4; records of a layer differ in length).
    key_patterns : tuple of tuples of (bits, channels)
        The menu, each entry for 64 channels; bits in {1, 2, 3, 4, 8, 16}, 16 meaning exact. A pattern may be given as a
        mapping ``{bits: channels}``.
    pattern_cost : {"model", "measured"}
        Expected error of a pattern or split: from the channel's variance, or by coding it.
    key_budget : float
        Of "budget" and "layer": key code bits per channel that a record may store (a mean over the heads of a layer for
        "layer"), 1 to 8, rounded down to whole u32 columns per token: ``floor(key_budget * head_dim / 32)``.
    thresholds : (float, float)
        (high, low): A_d above high stays exact, above low gets 4 bits, the others 2.
    key_range, value_range : {"minmax", "search", "search-mse"}
        Range of a group: its minimum and maximum; or the clip with the least error, in which the part of the error
        along the group counts more (docs/format.md section 4, step 4); or the clip with the least squared error.
    key_group_size : int
        Tokens that share a key channel's scale and offset; a multiple of 32 that divides ``block_length``.
    key_metadata, value_metadata : {"e5m3", "fp16"}
        8-bit scale and offset, or float16 scale and offset.
    key_reference : {"static", "none"}
        Code keys relative to a per-channel mean of the first packed block, or as they are.
    salience : {"rms", "mean_abs", "none"}
        I_d: root mean square or mean absolute value of the queries on channel d; "none": 1.
    value_bits : {1, 2, 3, 4, 8, 16}
        Bits of a value code; 16 keeps values exact.
    value_group_size : int
        Channels that share a value token's scale and offset; a multiple of 8; 0 means the whole head.
    value_basis : {"hadamard", "identity"}
        Rotate values before coding, or not.

    Raises
    ------
    ValueError, TypeError
        Naming the field, its value and what is allowed.
    """

    sink_length: int = 4
    residual_length: int = 128
    block_length: int = 128
    allocate: str = "patterns"
    key_patterns: tuple[tuple[tuple[int, int], ...], ...] = field(
        default_factory=lambda: PRESETS["default"]["key_patterns"]
    )
    pattern_cost: str = "model"
    key_budget: float = 3.0
    thresholds: tuple[float, float] = (1.44, 0.79)
    key_range: str = "search"
    key_group_size: int = 64
    key_metadata: str = "e5m3"
    key_reference: str = "static"
    salience: str = "rms"
    value_bits: int = 3
    value_group_size: int = 0
    value_range: str = "search"
    value_metadata: str = "e5m3"
    value_basis: str = "hadamard"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in allowed):
                raise ValueError(f"{name} is {value!r}, must be one of {', '.join(map(repr, allowed))}")
        exact = self.allocate == "exact"
        self._integer("sink_length", 0, None, 1)
        limit = MAX_EXACT_BLOCK if exact else MAX_CODED_BLOCK
        self._integer("block_length", 1 if exact else 32, limit, 1 if exact else 32)
        self._integer("residual_length", self.block_length, None, 1, "block_length <= residual_length")
        if not exact:
            self._integer("key_group_size", 32, self.block_length, 32)
            if self.block_length % self.key_group_size:
                raise ValueError(
                    f"block_length is {self.block_length}, must be a multiple of key_group_size ({self.key_group_size})"
                )
        self._integer("value_group_size", 0, MAX_HEAD_DIM, 8)
        object.__setattr__(self, "key_patterns", self._patterns(self.key_patterns))
        object.__setattr__(self, "key_budget", self._budget(self.key_budget))
        object.__setattr__(self, "thresholds", self._thresholds(self.thresholds))

    def _integer(self, name: str, low: int, high: int | None, step: int, rule: str = "") -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}, must be an int")
        if value < low or (high is not None and value > high) or value % step:
            multiple = f"a multiple of {step} " if step > 1 else ""
            upper = f" to {high}" if high is not None else " up"
            raise ValueError(f"{name} is {value}, must be {multiple}from {low}{upper}{f' ({rule})' if rule else ''}")

    @staticmethod
    def _patterns(patterns: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
        if isinstance(patterns, Mapping):
            patterns = (patterns,)
        try:
            menu = [dict(pattern) for pattern in patterns]
            numbers = [n for pattern in menu for pair in pattern.items() for n in pair]
        except (TypeError, ValueError):
            menu, numbers = [], [None]
        if not all(type(n) is int for n in numbers):
            raise TypeError(f"key_patterns is {patterns!r}, must be patterns such as {{4: 32, 2: 32}} in whole numbers")
        if not 1 <= len(menu) <= MAX_PATTERNS:
            raise ValueError(f"key_patterns has {len(menu)} entries, must have 1 to {MAX_PATTERNS}")
        for pattern in menu:
            for bits in pattern:
                if bits not in TIER_BITS:
                    raise ValueError(
                        f"key_patterns: {bits} bits in {pattern}, must be one of {', '.join(map(str, TIER_BITS))}"
                    )
            if sum(pattern.values()) != 64 or min(pattern.values()) < 0:
                raise ValueError(f"key_patterns: {pattern} must split 64 channels, it splits {sum(pattern.values())}")
        return tuple(tuple(sorted(pattern.items(), reverse=True)) for pattern in menu)

    @staticmethod
    def _budget(bits: Any) -> float:
        if isinstance(bits, bool) or not isinstance(bits, (int, float)):
            raise TypeError(f"key_budget is {bits!r}, must be a number")
        if not 1 <= bits <= 8:
            raise ValueError(f"key_budget is {bits}, must be from 1 to 8 bits per channel")
        return float(bits)

    @staticmethod
    def _thresholds(pair: Any) -> tuple[float, float]:
        try:
            high, low = pair
            if not all(isinstance(x, Real) and not isinstance(x, bool) for x in (high, low)):
                raise TypeError
        except (TypeError, ValueError):
            raise TypeError(f"thresholds is {pair!r}, must be a pair of numbers (high, low)") from None
        try:
            high, low = float(high), float(low)
        except OverflowError:  # an int may be larger
            high = math.inf
        if not 0 <= low <= high < math.inf:
            raise ValueError(f"thresholds is {pair!r:.80}, must be finite (high, low) with high >= low >= 0")
        return high, low

    @classmethod
    def preset(cls, name: str, **fields: Any) -> MixKVQConfig:
        """The preset ``name`` with some fields replaced.

        Raises
        ------
        ValueError
            For an unknown preset (naming the close ones) or a field outside its allowed set.
        TypeError
            For an unknown field, naming the close ones.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; {_close(name, PRESETS)}")
        return cls(**cls._known({**PRESETS[name], **fields}))

    @classmethod
    def _known(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        names = {f.name for f in dataclasses.fields(cls)}
        for name in fields:
            if name not in names:
                raise TypeError(f"unknown field {name!r} of MixKVQConfig; {_close(name, names)}")
        return dict(fields)

    def replace(self, **fields: Any) -> MixKVQConfig:
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **self._known(fields))

    def exact_capacity(self, margin: int = 0) -> int:
        """Tokens of a row that the exact buffers of a packed layer have room for; as many make a block due."""
        return self.sink_length + self.residual_length + margin

    def due_blocks(self, exact: int, margin: int = 0) -> int:
        """Blocks to pack of a row that has this many exact tokens.

        Parameters
        ----------
        exact : int
            Sinks and window.
        margin : int
            Tokens that stay in the window beyond ``residual_length``.
        """
        beyond = exact - self.exact_capacity(margin)
        return beyond // self.block_length + 1 if beyond >= 0 else 0

    @property
    def name(self) -> str:
        """Name of the preset that this configuration equals, or ``"custom"``."""
        return next((n for n in PRESETS if MixKVQConfig.preset(n) == self), "custom")

    def to_json(self) -> str:
        """The configuration as JSON; `from_json` reads it back to an equal object."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MixKVQConfig:
        """Read what `to_json` wrote. Raises as the constructor does."""
        return cls.from_json_object(json.loads(text))

    @classmethod
    def from_json_object(cls, fields: Any) -> MixKVQConfig:
        """Take what `to_json` wrote, parsed. Raises as the constructor does."""
        if not isinstance(fields, dict):
            raise ValueError(f"a MixKVQConfig in JSON is an object, not {str(fields)[:40]!r}")
        return cls(**cls._known(fields))

    def codec(self, head_dim: int, dtype: str) -> BlockCodec:
        """The block codec for one layer.

        Parameters
        ----------
        head_dim : int
            8 to 256, a multiple of 8.
        dtype : {"float32", "float16", "bfloat16"}
            The model's dtype.

        Raises
        ------
        ValueError
            If packed kernels do not support this head_dim or dtype, or ``key_budget`` holds fewer columns than one bit
            per channel needs.
        """
        if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim is {head_dim}, must be a multiple of 8 from 8 to {MAX_HEAD_DIM}")
        if dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"dtype is {dtype!r}, must be float32, float16 or bfloat16")
        columns = 0
        if self.allocate in ("budget", "layer"):
            columns, least = int(self.key_budget * head_dim / 32 + 1e-6), -(-head_dim // 32)
            if columns < least:
                raise ValueError(
                    f"key_budget is {self.key_budget}, must be at least {32 * least / head_dim:g} at head_dim "
                    f"{head_dim} (one bit per channel in whole columns)"
                )
        return BlockCodec(
            head_dim=head_dim,
            block_length=self.block_length,
            dtype=dtype,
            allocate=self.allocate,
            key_group=self.key_group_size,
            key_metadata=self.key_metadata,
            key_range=self.key_range,
            key_reference=self.key_reference == "static",
            value_bits=0 if self.value_bits == 16 else self.value_bits,
            value_group=min(self.value_group_size, head_dim) or head_dim,
            value_metadata=self.value_metadata,
            value_range=self.value_range,
            value_rotation=self.value_basis == "hadamard" and self.value_bits != 16,
            pattern_cost=self.pattern_cost,
            patterns=scale_menu([dict(pattern) for pattern in self.key_patterns], head_dim),
            threshold_high=self.thresholds[0],
            threshold_low=self.thresholds[1],
            budget_columns=columns,
        )
