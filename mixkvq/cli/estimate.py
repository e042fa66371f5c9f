"""``mixkvq estimate``: what the cache of a model will take with every preset, before anything is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import Estimate, estimate, largest_batch, largest_tokens
from ..calibration import Calibration
from ..config import MixKVQConfig, list_presets
from ..errors import UserError
from ..eval.models import DTYPES, load_config

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{end}B": base**power for end, base in (("", 1000), ("i", 1024)) for power, prefix in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)")


@dataclass(frozen=True)
class EstimateOptions:
    """Options of the command; the fields are explained in `mixkvq.cli.app`."""

    model: str
    tokens: int
    batch: int = 1
    preset: str | None = None
    dtype: str = "auto"
    calibration: Path | None = None
    memory: str | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, must be at least 1")
        if self.preset is not None:
            try:
                MixKVQConfig.preset(self.preset)
            except ValueError as error:
                raise UserError(f"--preset: {error}") from error
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.memory is not None:
            self.memory_bytes  # noqa: B018  (says what is wrong with it)

    @property
    def memory_bytes(self) -> int:
        """Bytes of ``memory``."""
        found = _SIZE.fullmatch(self.memory or "")
        scale = found and {unit.lower(): factor for unit, factor in _UNITS.items()}.get(found[2].lower())
        if not found or not scale:
            raise UserError(f"--memory is {self.memory!r}, must be a number of bytes such as 8GB, 8GiB or 500MB")
        return int(float(found[1]) * scale)


@dataclass(frozen=True)
class Row:
    """One preset."""

    found: Estimate
    rows: int | None
    """That fit into the memory."""
    row_tokens: int | None
    """Of each of the rows asked for, that fit into the memory."""

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        e = self.found
        facts: dict[str, Any] = {
            "preset": e.preset,
            "nbytes": e.nbytes,
            "least_nbytes": e.least_nbytes,
            "most_nbytes": e.most_nbytes,
            "peak_nbytes": e.peak_nbytes,
            "most_peak_nbytes": e.most_peak_nbytes,
            "share_of_dynamic_cache": None if e.nbytes is None else e.nbytes / e.dynamic_nbytes,
            "true_bits": e.true_bits,
            "true_bits_range": list(e.true_bits_range),
            "effective_bits": e.effective_bits,
            "packed_layers": sum(layer.path == "packed" for layer in e.layers),
        }
        if self.rows is not None:
            facts |= {"largest_batch": self.rows, "largest_tokens": self.row_tokens}
        return facts

    def cells(self) -> list[str]:
        """For the table."""
        e, sizes = self.found, [self.found.nbytes]
        if e.nbytes is None:
            sizes = [e.least_nbytes, e.most_nbytes]
        known = [n for n in sizes if n is not None]
        bits = e.true_bits_range if e.true_bits is None else [e.true_bits]
        fitting = [] if self.rows is None else [self.rows, self.row_tokens]
        return [
            e.preset,
            " to ".join(f"{n / 1e6:,.2f}" for n in known),
            " to ".join(f"{n / e.dynamic_nbytes:.3f}" for n in known),
            " to ".join(f"{b:.2f}" for b in bits) if e.record_elements else "-",
            *("any" if n is None else f"{n:,}" for n in fitting),
        ]


def estimate_command(options: EstimateOptions, console: Console) -> None:
    """Run the command.

    Raises
    ------
    UserError
        When there is no such model, or its code does not run without numbers.
    """
    config = load_config(options.model)
    calibration = None if options.calibration is None else _calibration(options)
    presets = list_presets() if options.preset is None else [options.preset]
    dtype = None if options.dtype == "auto" else options.dtype
    rows = []
    for preset in presets:
        more: dict[str, Any] = {"preset": preset, "dtype": dtype}
        if calibration is not None and (options.preset is not None or calibration.preset == preset):
            more["calibration"] = calibration
        try:
            found = estimate(config, tokens=options.tokens, batch=options.batch, **more)
        except (TypeError, ValueError, ImportError) as error:
            raise UserError(f"--model is {options.model!r}: {error}") from error
        fitting = (None, None) if options.memory is None else _fitting(config, options, more)
        rows.append(Row(found, *fitting))
    if options.json:
        print(json.dumps(_facts(options, config, rows), indent=2))
    else:
        _show(options, config, rows, console)


def _calibration(options: EstimateOptions) -> Calibration:
    try:
        return Calibration.of(options.calibration)
    except (OSError, ValueError) as error:
        raise UserError(f"--calibration: {error}") from error


def _fitting(config: Any, options: EstimateOptions, more: dict[str, Any]) -> tuple[int, int | None]:
    """Rows of the tokens asked for that fit into the memory; tokens of the rows asked for, None if all do."""
    rows = largest_batch(config, options.memory_bytes, tokens=options.tokens, **more)
    try:
        return rows, largest_tokens(config, options.memory_bytes, batch=options.batch, **more)
    except ValueError:  # the cache does not grow
        return rows, None


def _facts(options: EstimateOptions, config: Any, rows: list[Row]) -> dict[str, Any]:
    first = rows[0].found
    facts: dict[str, Any] = {
        "model": options.model,
        "model_type": config.model_type,
        "dtype": first.dtype,
        "tokens": first.tokens,
        "batch": first.batch,
        "layers": len(first.layers),
        "dynamic_cache_nbytes": first.dynamic_nbytes,
    }
    if options.memory is not None:
        facts["memory"] = options.memory_bytes
    return facts | {"presets": [row.facts() for row in rows]}


def _show(options: EstimateOptions, config: Any, rows: list[Row], console: Console) -> None:
    first = rows[0].found
    batch = "" if first.batch == 1 else f", {first.batch} rows"
    table = Table(
        title=f"{options.model} ({config.model_type}, {first.dtype}): {first.tokens:,} tokens{batch}",
        title_justify="left",
    )
    table.add_column("cache", no_wrap=True)
    names = ["MB", "share", "true bits"]
    if options.memory is not None:
        names += [f"rows in {options.memory}", f"tokens in {options.memory}"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=name not in ("MB", "share", "true bits"))
    table.add_row("DynamicCache", f"{first.dynamic_nbytes / 1e6:,.2f}", "1", *[""] * (len(names) - 2))
    for row in rows:
        table.add_row(*row.cells())
    console.print(table)
    packed = sum(layer.path == "packed" for layer in first.layers)
    notes = [
        f"{packed} of {len(first.layers)} layers packed; windows, tables and what is kept in full precision counted."
    ]
    open_ = [row.found.preset for row in rows if row.found.nbytes is None]
    if open_:
        notes.append(
            f"{', '.join(open_)}: the records depend on the text. `mixkvq calibrate --model {options.model} --preset "
            f"{open_[0]} --trials 0 --out FILE` measures them; then --calibration FILE."
        )
        if options.memory is not None:
            notes.append(f"What fits is told for the most that {', '.join(open_)} can take.")
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
