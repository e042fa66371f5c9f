"""``mixkvq eval generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from ...eval.schemes import EXACT
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
    Setup,
    Sink,
    Threads,
    app,
    set_up,
)
from .lists import at_least, names


@app.command("generate")
def generate(
    model: Model = DEFAULT_MODEL,
    schemes: Schemes = ALL_PRESETS,
    problems: Annotated[
        str | None,
        typer.Option(help="Solve maths problems instead: made, or a .jsonl file of questions and answers."),
    ] = None,
    count: Annotated[int, typer.Option(help="Prompts of each domain, or problems.")] = 8,
    domains: Annotated[
        str, typer.Option(help="Of the prompts: prose, code, maths, or paths of text or .jsonl files.")
    ] = "prose",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens of a continuation; most tokens of an answer.", show_default="64; 256 to solve")
    ] = 0,
    shots: Annotated[int, typer.Option(help="Worked problems in front of each.")] = 4,
    batch: Annotated[int, typer.Option(help="Prompts that are continued together.")] = 4,
    baseline: Baseline = None,
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    dtype: Dtype = "float32",
    out: Out = DEFAULT_OUT,
) -> None:
    """Greedy continuations against the exact cache's, or maths problems with their right answers."""
    new_tokens = max_new_tokens or (256 if problems else 64)
    chosen = names("--domains", domains)
    for option, value, least in (
        ("--count", count, 1),
        ("--prompt", prompt, 1),
        ("--max-new-tokens", new_tokens, 1),
        ("--shots", shots, 0),
        ("--batch", batch, 1),
    ):
        at_least(option, value, least)
    if problems is not None:
        from ...eval.models import quiet

        quiet()  # before lm-eval imports tqdm
        from ...eval.solve import choose

        choose(problems, count, shots)  # what is wrong with the file shows before the model is loaded
    setup = set_up(model=model, schemes=schemes, baseline=EXACT, sink=sink, threads=threads, dtype=dtype, out=out)
    if problems is None:
        _continue(setup, model, chosen, count, prompt, new_tokens, batch, baseline)
    else:
        _solve(setup, model, problems, count, shots, new_tokens, batch)
    for note in (_NOTE, f"Numbers: {setup.results.path}"):
        setup.console.print(note, style="dim", highlight=False)


def _continue(
    setup: Setup, model: str, domains: list[str], count: int, prompt: int, new: int, batch: int, baseline: str | None
) -> None:
    from ...errors import UserError
    from ...eval.generate import measure, summarize
    from ...eval.task_tables import greedy_table
    from ...eval.texts import windows

    known = {scheme.name: scheme for scheme in setup.schemes}
    default = next((name for name in known if name != EXACT), EXACT)
    base = known.get(baseline or default)
    if base is None:
        raise UserError(f"--baseline is {baseline!r}, must be one of --schemes: {', '.join(known)}")
    every = [window for name in domains for window in windows(setup.tokenizer, name, count, prompt)]
    display = setup.bar("continuing with every scheme")
    try:
        measure(setup.model, every, new, setup.schemes, setup.results, display.show, batch)
    finally:
        display.close()
    rows = summarize(setup.model, every, new, setup.schemes, setup.results, setup.baseline, base)
    title = f"{model}, {len(every)} prompts of {prompt} tokens from {', '.join(domains)}, {new} new tokens each"
    setup.console.print(greedy_table(title, rows, base.name))


def _solve(setup: Setup, model: str, source: str, count: int, shots: int, new: int, batch: int) -> None:
    from ...eval.lm import answer_together
    from ...eval.scores import compare, evaluate, run_harness
    from ...eval.solve import choose, task
    from ...eval.task_tables import score_tables

    questions, examples = choose(source, count, shots)
    display = setup.bar("solving problems with every scheme")
    try:
        answer_together(
            setup.model,
            setup.tokenizer,
            list(dict.fromkeys([setup.baseline, *setup.schemes])),
            lambda lm: run_harness(lm, [task(questions, examples, new)]),
            setup.results,
            display.show,
            batch,
        )
        rows = compare(
            setup.schemes,
            setup.baseline,
            lambda scheme: evaluate(
                setup.model,
                setup.tokenizer,
                scheme,
                [task(questions, examples, new)],
                setup.results,
                display.show,
                batch,
            ),
        )
    finally:
        display.close()
    title = f"{model}, {count} problems from {source}, {shots} worked ones before each, at most {new} new tokens"
    for table in score_tables(title, rows):
        setup.console.print(table)


_NOTE = (
    "Greedy. Brackets: 95 % intervals by bootstrap over prompts or problems, differences paired. True bits: all bytes "
    "of the coded blocks per number in them; effective: with what is still exact. Strict: the number behind ####; "
    "flexible: the last number of the answer. Simulated: coded by the NumPy reference and decoded at once, not packed."
)
