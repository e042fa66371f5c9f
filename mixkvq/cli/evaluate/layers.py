"""``mixkvq eval layers``."""

from __future__ import annotations

from pathlib import Path

from .app import (
    DEFAULT_MODEL,
    DEFAULT_OUT,
    DEFAULT_PROMPT,
    DEFAULT_SINK,
    Dtype,
    Model,
    Out,
    Prompt,
    Schemes,
    Sink,
    Threads,
    app,
    set_up,
)
from .dump import Context, Domain, Layers


@app.command("layers")
def layers(
    model: Model = DEFAULT_MODEL,
    schemes: Schemes = "default,compact",
    domain: Domain = "prose",
    context: Context = 2048,
    prefill: Prompt = DEFAULT_PROMPT,
    layers: Layers = "all",
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    dtype: Dtype = "float32",
    out: Out = DEFAULT_OUT,
) -> None:
    """Queries, key channels, bits and errors, layer by layer and head by head, with maps of all channels."""
    from ...eval.dump import observe, parse_layers
    from ...eval.layer_plots import layer_maps
    from ...eval.layers import Plan, maps, measure, pooled, summarize
    from ...eval.operator import check_prompt
    from ...eval.tables import layer_table
    from ...eval.texts import windows

    sinks, chosen = max(sink or 0, 0), parse_layers(layers)
    check_prompt(prefill, context, sinks)
    setup = set_up(model=model, schemes=schemes, sink=sink, threads=threads, dtype=dtype, out=out)
    plan = Plan(windows(setup.tokenizer, domain, 1, context)[0], prefill, sinks)
    display = setup.bar("attending with every scheme")
    try:
        states = observe(setup.model, plan.window, chosen, display.show)
        measure(setup.model, states, setup.schemes, plan, setup.results, display.show)
    finally:
        display.close()
    found = [x.layer for x in states]
    for scheme in setup.schemes:
        rows = summarize(setup.model, found, scheme, plan, setup.results)
        errors = ("key", "value", "logits", "output")
        total = {name: pooled(setup.model, found, scheme, plan, setup.results, name) for name in errors}
        setup.console.print(layer_table(f"{model}, {domain}: {scheme.label}", rows, total))
    title = f"{Path(model).name}, {context} tokens of {domain}: queries behind the first {prefill}"
    figure = layer_maps(out / "layers.png", maps(setup.model, found, setup.schemes, plan, setup.results), title)
    for note in (_NOTE, f"Figure: {figure}", f"Numbers: {setup.results.path}"):
        setup.console.print(note, style="dim", highlight=False)


_NOTE = (
    "Relative L2 errors, root mean squares over heads (all: and layers, 95 % by bootstrap); KL(exact || scheme) of "
    "the attention weights, nats. Keys, values and logits over the first tokens behind the sinks; outputs of all later "
    "queries. sd ln A: standard deviation of ln(I_d S_d) over the channels of a head."
)
