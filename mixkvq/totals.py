"""`StoreTotals`: what a packed store holds, counted record by record."""

from __future__ import annotations

from typing import NamedTuple

from . import _core
from .slabs import RecordTable


class StoreTotals(NamedTuple):
    """The fields are those of `report.LayerReport`."""

    elements: int
    record_bytes: int
    code_bytes: int
    metadata_bytes: int
    record_elements: int
    raised_scales: int
    exact_blocks: int
    host_bytes: int


def count(table: RecordTable, block: int, elements: int, raised: int) -> StoreTotals:
    """Count every live record once.

    Parameters
    ----------
    table : RecordTable
    block : int
        Elements of a record.
    elements, raised : int
        As in `StoreTotals`.
    """
    codes = metadata = exact = 0
    for record in table.records():
        info = _core.inspect(record)
        codes, metadata, exact = (
            codes + info["code_bytes"],
            metadata + info["metadata_bytes"],
            exact + (info["kind"] == 1),
        )
    live, sizes = table.distinct()
    return StoreTotals(elements, int(sizes.sum()), codes, metadata, block * len(live), raised, exact, table.host_bytes)
