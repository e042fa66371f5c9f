"""``mixkvq eval dump``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import UserError
from ..display import Display
from .app import DEFAULT_MODEL, Dtype, Model, Threads, app, console, set_threads

Domain = Annotated[str, typer.Option(help="prose, code, maths, or the path of a text or .jsonl file.")]
Context = Annotated[int, typer.Option(help="Tokens of the text.")]
Layers = Annotated[str, typer.Option(help="all, or indices and ranges such as 0,4,8-11.")]


@app.command("dump")
def dump(
    file: Annotated[Path, typer.Argument(help="Where to, such as smollm2-prose.safetensors.")],
    model: Model = DEFAULT_MODEL,
    domain: Domain = "prose",
    context: Context = 2048,
    layers: Layers = "all",
    dump_dtype: Annotated[str, typer.Option(help="float32 or float16, of the numbers in the file.")] = "float32",
    threads: Threads = None,
    dtype: Dtype = "float32",
) -> None:
    """Write a model's queries, keys and values of one text, for `mixkvq eval operator`."""
    from ...eval.dump import DTYPES, observe, parse_layers, write_dump
    from ...eval.models import load
    from ...eval.texts import windows

    if dump_dtype not in DTYPES:
        raise UserError(f"--dump-dtype is {dump_dtype!r}, must be one of {', '.join(DTYPES)}")
    if context < 2:
        raise UserError(f"--context is {context}, must be at least 2")
    chosen, terminal = parse_layers(layers), console()
    set_threads(threads)

    def say(text: str) -> None:
        terminal.print(text, style="dim", highlight=False)

    loaded, tokenizer = load(model, dtype, say)
    window = windows(tokenizer, domain, 1, context)[0]
    display = Display(terminal, {"layer": "reading the text"})
    try:
        states = observe(loaded, window, chosen, display.show)
    finally:
        display.close()
    write_dump(file, loaded, window, states, dump_dtype, say)
    terminal.print(f"Written: {file} ({file.stat().st_size / 1e6:,.1f} MB)", highlight=False)
