"""What the oracle asks of a codec: the fields of ``mkvq_codec``, named and valued as in `mixkvq.config.BlockCodec`."""

from __future__ import annotations

from typing import Protocol


class Codec(Protocol):
    """Read-only fields; csrc/mixkvq.h documents their ranges."""

    @property
    def head_dim(self) -> int: ...
    @property
    def block_length(self) -> int: ...
    @property
    def dtype(self) -> str:
        """``"float32"``, ``"float16"`` or ``"bfloat16"``."""
        ...

    @property
    def allocate(self) -> str:
        """``"patterns"``, ``"threshold"``, ``"exact"``, ``"budget"`` or ``"layer"``."""
        ...

    @property
    def key_group(self) -> int: ...
    @property
    def key_metadata(self) -> str:
        """``"e5m3"`` or ``"fp16"``."""
        ...

    @property
    def key_range(self) -> str:
        """``"minmax"`` or ``"search"``."""
        ...

    @property
    def key_reference(self) -> bool: ...
    @property
    def value_bits(self) -> int:
        """1, 2, 3, 4, 8; 0 means exact."""
        ...

    @property
    def value_group(self) -> int: ...
    @property
    def value_metadata(self) -> str: ...
    @property
    def value_range(self) -> str: ...
    @property
    def value_rotation(self) -> bool: ...
    @property
    def pattern_cost(self) -> str:
        """``"model"`` or ``"measured"``."""
        ...

    @property
    def budget_columns(self) -> int:
        """Key columns per head, of "budget" and "layer"."""
        ...

    @property
    def patterns(self) -> tuple[tuple[int, ...], ...]:
        """Channels per tier id: 1, 2, 3, 4, 8 bits, exact."""
        ...

    @property
    def threshold_high(self) -> float: ...
    @property
    def threshold_low(self) -> float: ...
