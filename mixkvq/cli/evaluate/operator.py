"""``mixkvq eval operator``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import (
    ALL_PRESETS,
    DEFAULT_OUT,
    DEFAULT_PROMPT,
    DEFAULT_SINK,
    Baseline,
    Out,
    Prompt,
    Schemes,
    Sink,
    Threads,
    app,
    check_options,
)


@app.command("operator")
def operator(
    file: Annotated[Path, typer.Argument(help="Written by `mixkvq eval dump`.")],
    schemes: Schemes = ALL_PRESETS,
    prefill: Prompt = DEFAULT_PROMPT,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="One table per layer, too.")] = False,
    baseline: Baseline = None,
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    out: Out = DEFAULT_OUT,
) -> None:
    """Error of attention on the queries, keys and values in a file, scheme by scheme; no model is needed."""
    from ...eval.dump import Dump
    from ...eval.operator import check_prompt, measure, summarize
    from ...eval.tables import operator_table

    options = check_options(schemes=schemes, baseline=baseline, sink=sink, threads=threads, out=out)
    dump, sinks = Dump.open(file), max(sink or 0, 0)
    check_prompt(prefill, dump.tokens, sinks)
    display = options.bar("attending with every scheme")
    try:
        measure(dump, options.schemes, prefill, sinks, options.results, display.show)
    finally:
        display.close()
    about, base = dump.about, options.baseline
    groups = [(f"layer {i}", [i]) for i in dump.layers] if per_layer else []
    for name, layers in [*groups, (f"{len(dump.layers)} layers", dump.layers)]:
        rows = summarize(dump, options.schemes, prefill, sinks, options.results, base, layers)
        title = f"{about['model']}, {about['domain']}, {name}: {dump.tokens - prefill} queries behind {prefill} tokens"
        options.console.print(operator_table(title, rows, base.name))
    for note in (_NOTE, f"Numbers: {options.results.path}"):
        options.console.print(note, style="dim", highlight=False)


_NOTE = (
    "Relative L2 errors of logits (over the first tokens behind the sinks) and of attention outputs, KL(exact || "
    "scheme) of the attention weights; over query heads and stretches of 64 queries, whose bootstrap gives the 95 % "
    "intervals, ratios paired. Keys and values as the file has them, in float32. True bits: all bytes of what is coded "
    "per number in it."
)
