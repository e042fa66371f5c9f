"""``mixkvq eval kl``: KL divergence, likelihood and top-1 agreement of teacher-forced text, scheme by scheme."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import UserError
from ..fingerprint import identity
from .bits import bits_of, bits_over
from .forced import chunk_ends, compare, forced_logits
from .replay import Prefill
from .results import Results, rounded
from .schemes import EXACT, Scheme, parse_scheme
from .stats import Interval, mean_interval, ratio_interval, stretches
from .stream import Emit
from .texts import Window

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """How a text is read.

    Attributes
    ----------
    context : int
        Tokens of a window.
    prefill : int
        Of these, how many are read in one exact pass; the others are scored.
    sink_length, block_length : int
        Chunks end where blocks of this schedule end, so no chunk is longer than ``block_length``.
    """

    context: int = 2048
    prefill: int = 1536
    sink_length: int = 4
    block_length: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.prefill < self.context:
            raise UserError(f"--prefill is {self.prefill}, must be from 1 to --context ({self.context}) less 1")

    @classmethod
    def of(cls, schemes: Sequence[Scheme], context: int, prefill: int) -> Protocol:
        """The protocol whose chunks end where blocks of these schemes end.

        Raises
        ------
        UserError
            If their blocks end at different tokens, or the exact window is no whole number of blocks.
        """
        found: dict[tuple[int, int], str] = {}
        for scheme in schemes:
            if scheme.config is None:
                continue
            sink, block = scheme.config.sink_length, scheme.config.block_length
            if scheme.config.residual_length % block:
                raise UserError(
                    f"--schemes: {scheme.name} has residual_length {scheme.config.residual_length}, must be a multiple "
                    f"of its block_length ({block}) here: chunks end on block borders"
                )
            found.setdefault((sink, block), scheme.name)
        if len(found) > 1:
            what = "; ".join(f"{name} has {sink} and {block}" for (sink, block), name in found.items())
            raise UserError(
                f"--schemes must share sink_length and block_length, for chunks to end on block borders: {what}"
            )
        return cls(context, prefill, *next(iter(found), (cls.sink_length, cls.block_length)))

    @property
    def ends(self) -> list[int]:
        """Ends of the chunks."""
        return list(chunk_ends(self.prefill, self.context, self.sink_length, self.block_length))

    def __str__(self) -> str:
        return (
            f"{self.prefill} tokens read at once, {self.context - self.prefill} teacher-forced in {len(self.ends)} "
            f"chunks that end on block borders (at most {self.block_length} tokens)"
        )


def key_of(model: Any, window: Window, protocol: Protocol, scheme: Scheme) -> dict[str, Any]:
    """What a measurement is found by."""
    return {
        "measure": "kl",
        **identity(model),
        "domain": window.domain,
        "window": window.index,
        "text": window.digest,
        "protocol": str(protocol),
        "chunk_ends": protocol.ends,
        "scheme": scheme.name,
        "details": scheme.details,
    }


def measure(
    model: Any, windows: Sequence[Window], schemes: Sequence[Scheme], protocol: Protocol, results: Results, emit: Emit
) -> None:
    """Measure what ``results`` does not hold yet; `emit` is told of ("chunk", (done, total)) each time."""
    total, done = len(windows) * len(schemes), 0
    for window in windows:
        todo = [s for s in schemes if results.find(key_of(model, window, protocol, s)) is None]
        done += len(schemes) - len(todo)
        for scheme, values in _measure_window(model, window, todo, protocol) if todo else ():
            results.add(key_of(model, window, protocol, scheme), values)
            done += 1
            emit("chunk", (done, total))
    emit("chunk", (total, total))


def _measure_window(
    model: Any, window: Window, schemes: Sequence[Scheme], protocol: Protocol
) -> Iterator[tuple[Scheme, dict[str, Any]]]:
    ids = torch.tensor([window.ids])
    if ids.shape[1] != protocol.context:
        raise ValueError(f"window has {ids.shape[1]} tokens, must have {protocol.context}")
    prefill, ends = Prefill.record(model, ids[:, : protocol.prefill]), protocol.ends
    exact = list(forced_logits(model, ids, prefill, parse_scheme(EXACT).cache(model), ends))
    targets = torch.cat([ids[0, protocol.prefill + 1 :], torch.tensor([-1])])
    for scheme in schemes:
        cache = scheme.cache(model)
        found = compare(exact, forced_logits(model, ids, prefill, cache, ends), targets)
        values: dict[str, Any] = {
            "kl": rounded(found.kl),
            "nll_change": rounded((found.nll - found.nll_exact)[:-1]),
            "agree": found.agree.astype(int).tolist(),
        }
        yield scheme, values | bits_of(cache)


def path_note(kind: str, paths: Mapping[str, int]) -> str:
    """Paths of a cache's layers, such as "3 packed, 15 native"; empty if all are what the scheme's kind promises."""
    usual = {"exact": "native", "transformers": "quantized"}.get(kind, kind)
    return "" if set(paths) <= {usual} else ", ".join(f"{n} {path}" for path, n in paths.items())


@dataclass(frozen=True)
class Summary:
    """One scheme over some windows."""

    scheme: Scheme
    true_bits: float | None
    effective_bits: float | None
    kl: Interval
    p99: float
    nll_change: Interval
    agreement: Interval
    ratio: Interval | None
    """KL relative to the baseline, paired; None without one."""
    positions: int
    paths: dict[str, int]
    """Layers by path, such as ``{"packed": 30}``."""


def summarize(
    model: Any,
    windows: Sequence[Window],
    schemes: Sequence[Scheme],
    protocol: Protocol,
    results: Results,
    baseline: Scheme | None = None,
) -> list[Summary]:
    """What ``results`` holds, one row per scheme. All windows must have been measured."""

    def values(scheme: Scheme) -> list[dict[str, Any]]:
        return results.rows((key_of(model, w, protocol, scheme) for w in windows), f"scheme {scheme.name}")

    def units(rows: list[dict[str, Any]], name: str) -> Doubles:
        return stretches([np.asarray(row[name], np.float64) for row in rows])

    base = None if baseline is None else units(values(baseline), "kl")
    summaries = []
    for scheme in schemes:
        rows = values(scheme)
        kl, every = units(rows, "kl"), np.concatenate([np.asarray(row["kl"]) for row in rows])
        true_bits, effective_bits = bits_over(rows)
        summaries.append(
            Summary(
                scheme=scheme,
                true_bits=true_bits,
                effective_bits=effective_bits,
                kl=mean_interval(kl),
                p99=float(np.quantile(every, 0.99)),
                nll_change=mean_interval(units(rows, "nll_change")),
                agreement=mean_interval(units(rows, "agree")),
                ratio=None if base is None or not base.any() else ratio_interval(kl, base),
                positions=every.size,
                paths=rows[0]["paths"],
            )
        )
    return summaries
