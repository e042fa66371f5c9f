"""``mixkvq eval kl``."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import UserError
from .app import (
    ALL_PRESETS,
    DEFAULT_MODEL,
    DEFAULT_OUT,
    DEFAULT_SINK,
    Baseline,
    Dtype,
    Model,
    Out,
    Schemes,
    Sink,
    Threads,
    app,
    set_up,
)
from .lists import names as domain_names


@app.command("kl")
def kl(
    model: Model = DEFAULT_MODEL,
    schemes: Schemes = ALL_PRESETS,
    domains: Annotated[
        str, typer.Option(help="prose, code, maths, or paths of text or .jsonl files; separated by commas.")
    ] = "prose,code,maths",
    windows: Annotated[int, typer.Option(help="Windows per domain.")] = 2,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    prefill: Annotated[int, typer.Option(help="Of these, how many are read at once before the comparison.")] = 1536,
    baseline: Baseline = None,
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    dtype: Dtype = "float32",
    out: Out = DEFAULT_OUT,
) -> None:
    """KL divergence, likelihood and top-1 agreement with the exact cache on teacher-forced text."""
    from ...eval.kl import Protocol, measure, summarize
    from ...eval.plots import frontier
    from ...eval.tables import kl_table
    from ...eval.texts import windows as stretches

    Protocol(context, prefill)  # what is wrong with these shows before the model is loaded
    if windows < 1:
        raise UserError(f"--windows is {windows}, must be at least 1")
    names = domain_names("--domains", domains)
    setup = set_up(model=model, schemes=schemes, baseline=baseline, sink=sink, threads=threads, dtype=dtype, out=out)
    protocol = Protocol.of(setup.schemes, context, prefill)
    texts = {name: stretches(setup.tokenizer, name, windows, context) for name in names}
    every = [window for part in texts.values() for window in part]
    display = setup.bar("reading with every scheme")
    try:
        measure(setup.model, every, setup.schemes, protocol, setup.results, display.show)
    finally:
        display.close()
    base = setup.baseline
    groups = [("all domains", every), *(texts.items() if len(texts) > 1 else [])]
    for name, part in groups:
        rows = summarize(setup.model, part, setup.schemes, protocol, setup.results, base)
        title = f"{model}, {name}: {rows[0].positions} positions"
        setup.console.print(kl_table(title, rows, base.name))
    rows = summarize(setup.model, every, setup.schemes, protocol, setup.results, base)
    figure = frontier(out / "kl.png", rows, f"{model}, {len(every)} windows of {', '.join(names)}")
    for note in (f"Protocol: {protocol}.", _NOTE, f"Figure: {figure}", f"Numbers: {setup.results.path}"):
        setup.console.print(note, style="dim", highlight=False)


_NOTE = (
    "KL(exact || scheme). Brackets: 95 % intervals by bootstrap over stretches of 64 positions, ratios paired. True "
    "bits: all bytes of the coded blocks per number in them; effective: with the exact newest tokens of these windows. "
    "Simulated: coded by the NumPy reference and decoded at once, not packed."
)
