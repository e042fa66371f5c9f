"""``mixkvq eval recall``."""

from __future__ import annotations

from typing import Annotated

import typer

from ...eval.documents import MOST_QUESTIONS, TASKS
from ...eval.schemes import EXACT
from .app import (
    ALL_PRESETS,
    DEFAULT_MODEL,
    DEFAULT_OUT,
    DEFAULT_SINK,
    Dtype,
    Model,
    Out,
    Schemes,
    Sink,
    Threads,
    app,
    set_up,
)
from .lists import at_least, names, numbers


@app.command("recall")
def recall(
    model: Model = DEFAULT_MODEL,
    schemes: Schemes = ALL_PRESETS,
    lengths: Annotated[
        str, typer.Option(help="Tokens of a document, its questions and answers included; separated by commas.")
    ] = "1024,2048,4096,8192",
    tasks: Annotated[str, typer.Option(help="Some of needles, pairs, variables.")] = "needles,pairs,variables",
    documents: Annotated[int, typer.Option(help="Documents per task and length.")] = 8,
    questions: Annotated[int, typer.Option(help="Questions per document.")] = 8,
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    dtype: Dtype = "float32",
    out: Out = DEFAULT_OUT,
) -> None:
    """Facts hidden in long documents: right answers and their probability, against the exact cache."""
    from ...eval.documents import document
    from ...eval.recall import PROTOCOL, measure, summarize
    from ...eval.task_tables import recall_table

    sizes, chosen = numbers("--lengths", lengths), names("--tasks", tasks, TASKS)
    at_least("--documents", documents, 1)
    at_least("--questions", questions, 1, MOST_QUESTIONS)
    setup = set_up(model=model, schemes=schemes, baseline=EXACT, sink=sink, threads=threads, dtype=dtype, out=out)
    every = [
        document(setup.tokenizer, task, size, index, questions)
        for size in sizes
        for task in chosen
        for index in range(documents)
    ]
    display = setup.bar("reading documents with every scheme")
    try:
        measure(setup.model, every, setup.schemes, setup.results, display.show)
    finally:
        display.close()
    rows = summarize(setup.model, every, setup.schemes, setup.results, setup.baseline)
    for size, task in dict.fromkeys((row.length, row.task) for row in rows):
        part = [row for row in rows if (row.length, row.task) == (size, task)]
        title = f"{model}, {task}, {size} tokens: {documents} documents, {part[0].answers} answers"
        setup.console.print(recall_table(title, part))
    for note in (f"Protocol: {PROTOCOL}.", _NOTE, f"Numbers: {setup.results.path}"):
        setup.console.print(note, style="dim", highlight=False)


_NOTE = (
    "Right: every token of the answer is the most likely one. Changes are to the exact cache, on the same answers. "
    "Brackets: 95 % intervals by bootstrap over documents. True bits: all bytes of coded blocks per number in them; "
    "effective: with what is still exact. Simulated: coded by the NumPy reference and decoded at once, not packed."
)
