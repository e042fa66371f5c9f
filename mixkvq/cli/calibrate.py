"""``mixkvq calibrate``: what to set for one model, written as a file for `MixKVQCache(calibration=...)`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..calibration import Calibration
from ..config import MixKVQConfig
from ..errors import UserError
from ..files import whole_file
from ..fingerprint import fingerprint, identity
from ..sizes import records_summary
from ..version import __version__
from .display import Display
from .evaluate.lists import names as domain_names


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of the command; the fields are explained in `mixkvq.cli.app`."""

    model: str
    preset: str = "paper"
    target_bits: float | None = None
    max_bits: float | None = None
    trials: int = 30
    highest: float = 2.0
    seed: int = 0
    domains: str = "prose,code,maths"
    windows: int = 1
    context: int = 2048
    prefill: int = 1536
    sink: int | None = None
    threads: int | None = None
    dtype: str = "float32"
    out: Path = Path("calibration.json")

    def __post_init__(self) -> None:
        try:
            config = MixKVQConfig.preset(self.preset)
        except ValueError as error:
            raise UserError(f"--preset: {error}") from error
        if config.allocate not in ("threshold", "patterns") or len(config.key_patterns) == 1:
            raise UserError(f"--preset is {self.preset}, which has nothing to calibrate")
        if config.allocate != "threshold" and (self.target_bits is not None or self.max_bits is not None):
            raise UserError(f"--target-bits and --max-bits are for thresholds; {self.preset} has none")
        for name, low in (("trials", 0), ("windows", 1), ("threads", 1), ("sink", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name} is {value}, must be at least {low}")
        if not 0.1 < self.highest <= 1e4:
            raise UserError(f"--highest is {self.highest}, must be above 0.1 and at most 10000")
        if self.target_bits is not None and not 2 <= self.target_bits < 16:
            raise UserError(f"--target-bits is {self.target_bits}, must be from 2 to below 16 bits per key code")

    @property
    def config(self) -> MixKVQConfig:
        """The preset with `fields`."""
        return MixKVQConfig.preset(self.preset, **self.fields)

    @property
    def fields(self) -> dict[str, Any]:
        """Fields that replace the preset's."""
        return {} if self.sink is None else {"sink_length": self.sink}


def calibrate(options: CalibrateOptions, console: Console) -> int:
    """Run the command; returns the exit status: 1 if nothing better than the preset was found.

    Raises
    ------
    UserError
        When the model, the text or the folder is missing.
    """
    import torch

    from ..calibrate.reading import Readings, calibration_windows
    from ..eval.kl import Protocol
    from ..eval.models import load

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    config, names = options.config, domain_names("--domains", options.domains)
    protocol = Protocol(options.context, options.prefill, config.sink_length, config.block_length)
    model, tokenizer = load(options.model, options.dtype, lambda text: console.print(text, style="dim"))
    # twice as many for a profile: one half to choose by, the other to judge by
    profile = config.allocate != "threshold"
    halves = 2 if profile else 1
    texts = [calibration_windows(tokenizer, name, halves * options.windows, options.context) for name in names]
    with console.status("reading with the exact cache"):
        readings = Readings(model, [w for part in texts for w in part[::halves]], protocol)
    count = f"{len(readings.texts)} windows of {options.context} tokens from {', '.join(names)}"
    if profile:
        with console.status("reading what the profile is judged by"):
            held_out = Readings(model, [w for part in texts for w in part[1::halves]], protocol)
        return _profile(options, console, readings, held_out, count)
    if options.target_bits is not None:
        return _scale(options, console, readings, count)
    if options.trials == 0:
        return _measure(options, console, readings, count, config.thresholds, {})
    return _search(options, console, readings, count)


def _write(options: CalibrateOptions, made: Calibration, summary: Mapping[str, Any]) -> None:
    with whole_file(options.out) as file:
        file.write_text(replace(made, summary={**summary, "made_by": f"mixkvq {__version__}"}).to_json())


def _measure(
    options: CalibrateOptions,
    console: Console,
    readings: Any,
    count: str,
    pair: tuple[float, float],
    more: Mapping[str, Any],
) -> int:
    """Measure a pair of thresholds and write it, with ``more`` in the summary."""
    from ..cache import MixKVQCache

    chosen = options.config.replace(thresholds=pair)
    measured = readings.measure(lambda: MixKVQCache(chosen, config=readings.model.config))
    code_bits = f"{more['key_code_bits']:.4f} bits per key code, " if "key_code_bits" in more else ""
    console.print(
        f"thresholds ({pair[0]:.4f}, {pair[1]:.4f}): {code_bits}{measured.true_bits:.3f} true bits, "
        f"KL {measured.kl:.4f} nats on {count}",
        highlight=False,
        soft_wrap=True,
    )
    summary = {
        **more,
        "true_bits": measured.true_bits,
        "kl_nats": measured.kl,
        "texts": count,
        "records": records_summary(measured.records),
    }
    fields = {**options.fields, "thresholds": list(pair)}
    _write(options, Calibration(fingerprint(readings.model.config), options.preset, fields), summary)
    console.print(f"Calibration: {options.out}", highlight=False, soft_wrap=True)
    return 0


def _scale(options: CalibrateOptions, console: Console, readings: Any, count: str) -> int:
    from ..calibrate.thresholds import scale_thresholds

    config = options.config
    with console.status("scaling the published pair"):
        try:
            found = scale_thresholds(readings.model, readings.prefills, config, float(options.target_bits or 0))
        except ValueError as error:
            raise UserError(f"--target-bits: {error}") from error
    return _measure(options, console, readings, count, found.thresholds, {"key_code_bits": found.code_bits})


def _search(options: CalibrateOptions, console: Console, readings: Any, count: str) -> int:
    from ..calibrate.plots import pareto_figure
    from ..calibrate.study import cut_off, pareto, pick, search

    config = options.config
    what = [repr(identity(readings.model)), config.to_json(), str(readings.protocol)]
    what += [text.digest for text in readings.texts] + [repr(options.highest)]
    name = f"paper-{hashlib.sha256(repr(what).encode()).hexdigest()[:12]}"
    journal = options.out.with_suffix(".study.log")
    journal.parent.mkdir(parents=True, exist_ok=True)
    display = Display(console, {"chunk": "trials"})
    try:
        trials = search(readings, config, options.trials, options.seed, journal, name, display.show, options.highest)
    finally:
        display.close()
    front = pareto(trials)
    chosen = pick(front, options.max_bits)
    table = Table(title=f"Best of {len(trials)} pairs on {count}", title_justify="left")
    for column in ("high", "low", "true bits", "KL, nats", ""):
        table.add_column(column, justify="right")
    for trial in front:
        mark = "chosen" if trial is chosen else ""
        high, low = trial.thresholds
        table.add_row(f"{high:.3f}", f"{low:.3f}", f"{trial.true_bits:.3f}", f"{trial.kl:.4f}", mark)
    console.print(table)
    if cut_off(chosen, options.highest):
        console.print(
            f"The chosen pair is at the end of the range; --highest above {options.highest:g} tries larger ones."
        )
    figure = options.out.with_suffix(".png")
    pareto_figure(figure, trials, front, chosen, f"{options.model}: thresholds of `paper`, {len(trials)} trials")
    rule = "least KL within --max-bits" if options.max_bits is not None else "least KL x true bits"
    console.print(f"Chosen by: {rule}\nFigure: {figure}\nStudy: {journal}", highlight=False, soft_wrap=True)
    more = {"trials": len(trials), "rule": rule}
    return _measure(options, console, readings, count, chosen.thresholds, more)


def _profile(options: CalibrateOptions, console: Console, readings: Any, held_out: Any, count: str) -> int:
    from ..calibrate.profile import make_profile

    display = Display(console, {"chunk": "measuring every layer alone"})
    try:
        found = make_profile(readings, held_out, options.preset, options.fields, display.show)
    finally:
        display.close()
    console.print(
        f"{options.preset}: KL {found.kl[1]:.4f} nats at {found.true_bits[1]:.3f} true bits; with the profile "
        f"{found.kl[0]:.4f} at {found.true_bits[0]:.3f}; ratio {found.ratio.value:.3f} "
        f"[{found.ratio.low:.3f}, {found.ratio.high:.3f}] on {count} that it was not made from",
        highlight=False,
        soft_wrap=True,
    )
    if not found.ratio.high < 1:
        console.print("No gain beyond chance: nothing written.", style="bold", highlight=False)
        return 1
    summary = {
        "true_bits": found.true_bits[0],
        "kl_nats": found.kl[0],
        "kl_ratio_to_preset": [found.ratio.value, found.ratio.low, found.ratio.high],
        "texts": count,
    }
    _write(options, found.calibration, summary)
    console.print(f"Calibration: {options.out}", highlight=False, soft_wrap=True)
    return 0
