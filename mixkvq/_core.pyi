"""Types of the C extension; `csrc/mixkvq.h` is the manual."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray
from typing_extensions import Buffer

Array: TypeAlias = NDArray[Any] | tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""A NumPy array, or (address, dtype code, shape, strides in elements); dense side arrays ignore code and strides."""

__version__: str
_C_API: object

class Codec:
    def __new__(
        cls,
        head_dim: int,
        block_length: int,
        dtype: int,
        allocate: int,
        key_group: int,
        key_metadata: int,
        key_range: int,
        key_reference: int,
        value_bits: int,
        value_group: int,
        value_metadata: int,
        value_range: int,
        value_rotation: int,
        pattern_cost: int,
        budget_columns: int,
        threshold_high: float,
        threshold_low: float,
        patterns: Sequence[Sequence[int]],
    ) -> Codec: ...
    @property
    def record_bound(self) -> int: ...

class Layer:
    """One layer's packed history and exact window.

    ``slab_base`` holds addresses in an ordinary array, which cannot be checked: ``slab_bytes`` bytes of records must be
    there, as long as the layer is.
    """

    def __new__(
        cls,
        k: Array,
        v: Array,
        exact: Array,
        start: Array | None,
        sink_length: int,
        slab_base: Array,
        slab_bytes: Array,
        place: Array,
        blocks: Array,
        mu: Array | None,
    ) -> Layer: ...
    def attend(
        self,
        q: Array,
        out: Array,
        mask: Array | None,
        causal: bool,
        scaling: float,
        softcap: float,
        sink_logits: Array | None,
        precision: int,
        /,
    ) -> None: ...
    def append(self, k_new: Array, v_new: Array, /) -> None: ...
    def unpack(self, k: Array, v: Array, first: Array, /) -> None: ...

def pack(
    codec: Codec,
    k: Array,
    v: Array,
    first: Array,
    blocks: Array,
    importance: Array | None,
    mu: Array | None,
    has_mu: Array | None,
    out: Array,
    out_stride: int,
    sizes: Array,
    raised: Array | None,
    /,
) -> None: ...
def salience(q: Array, kv_heads: int, power: int, first: Array | None, sum: Array, /) -> None: ...
def inspect(record: Buffer, /) -> dict[str, Any]: ...
def isa() -> str: ...
def isas() -> list[tuple[str, bool]]: ...
def set_isa(name: str | None, /) -> None: ...
def build_info() -> dict[str, Any]: ...
def set_executor_address(address: int, /) -> None: ...
