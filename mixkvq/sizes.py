"""How long the records of a codec are, before anything is packed (docs/format.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import BlockCodec
from .policy.patterns import TIER_BITS, column_count
from .reference.layout import record_nbytes
from .reference.numbers import ITEM_BYTES


@dataclass(frozen=True)
class Amount:
    """Bytes: at least, at most, and the expected number; None where that depends on what is read."""

    least: int
    most: int
    expected: float | None

    @classmethod
    def of(cls, nbytes: int) -> Amount:
        """A number that is known."""
        return cls(nbytes, nbytes, nbytes)

    def __add__(self, other: Amount) -> Amount:
        known = None if self.expected is None or other.expected is None else self.expected + other.expected
        return Amount(self.least + other.least, self.most + other.most, known)

    @property
    def rounded(self) -> int | None:
        """The expected number in whole bytes."""
        return None if self.expected is None else round(self.expected)

    def or_more(self, other: Amount) -> Amount:
        """The larger one."""
        unknown = self.expected is None or other.expected is None
        known = None if unknown else max(self.expected or 0, other.expected or 0)
        return Amount(max(self.least, other.least), max(self.most, other.most), known)

    def __mul__(self, count: int) -> Amount:
        known = None if self.expected is None else self.expected * count
        return Amount(self.least * count, self.most * count, known)


@dataclass(frozen=True)
class MeasuredRecords:
    """The records of one layer, as text filled them.

    Attributes
    ----------
    dtype : str
        Of the model.
    nbytes : float
        Mean length.
    exact_channels : float
        Mean number of key channels that are exact.
    """

    dtype: str
    nbytes: float
    exact_channels: float

    def at(self, codec: BlockCodec) -> float:
        """Mean length in another dtype: only what is exact has one."""
        exact = self.exact_channels + (0 if codec.value_bits else codec.head_dim)
        return self.nbytes + codec.block_length * exact * (ITEM_BYTES[codec.dtype] - ITEM_BYTES[self.dtype])


def record_amount(codec: BlockCodec, measured: MeasuredRecords | None = None) -> Amount:
    """Length of one record of finite keys and values.

    Thresholds give every channel its bits by what is in it: known only if it was measured. Under a budget records may
    be shorter where channels are constant; it is expected to be spent.
    """
    if codec.allocate == "exact":
        return Amount.of(record_nbytes(codec))
    if codec.allocate == "patterns":
        lengths = sorted({record_nbytes(codec, counts) for counts in codec.patterns})
        return Amount(lengths[0], lengths[-1], lengths[0] if len(lengths) == 1 else _within(lengths, codec, measured))
    if codec.allocate == "threshold":
        ends = [record_nbytes(codec, _all_at(bits, codec.head_dim)) for bits in (2, 16)]
        return Amount(ends[0], ends[1], _within(ends, codec, measured))
    least = _all_at(1, codec.head_dim)
    shortest = record_nbytes(codec, least)
    spent = shortest + 4 * codec.block_length * (codec.budget_columns - column_count(least))
    return Amount(shortest, spent, spent)


def _all_at(bits: int, head_dim: int) -> tuple[int, ...]:
    """All channels in one tier, 16 bits for the exact one."""
    return tuple(head_dim if bits == tier else 0 for tier in TIER_BITS)


def _within(lengths: list[int], codec: BlockCodec, measured: MeasuredRecords | None) -> float | None:
    return None if measured is None else min(max(measured.at(codec), lengths[0]), lengths[-1])


def records_summary(measured: Mapping[int, MeasuredRecords]) -> dict[str, Any]:
    """What `measured_records` reads, for a calibration's summary."""
    dtypes = {found.dtype for found in measured.values()}
    layers = {str(i): [round(m.nbytes, 1), round(m.exact_channels, 3)] for i, m in sorted(measured.items())}
    return {"dtype": next(iter(dtypes), "float32"), "layers": layers}


def measured_records(summary: Mapping[str, Any]) -> dict[int, MeasuredRecords]:
    """What `mixkvq calibrate` wrote about the records of every layer; empty if it measured none.

    Raises
    ------
    ValueError
        If that was not written by it.
    """
    found = summary.get("records", {"dtype": "float32", "layers": {}})
    try:
        dtype = found["dtype"]
        records = {int(i): MeasuredRecords(dtype, float(n), float(e)) for i, (n, e) in found["layers"].items()}
        if dtype not in ITEM_BYTES or not all(r.nbytes > 0 and r.exact_channels >= 0 for r in records.values()):
            raise ValueError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"summary has the records {found!r:.200}, must be a dtype and, for each layer, mean bytes and exact "
            "channels"
        ) from None
    return records
