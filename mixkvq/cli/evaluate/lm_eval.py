"""``mixkvq eval lm-eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UserError
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
from .lists import at_least, names


@app.command("lm-eval")
def lm_eval(
    tasks: Annotated[str, typer.Option(help="Names of lm-eval tasks, separated by commas.")],
    model: Model = DEFAULT_MODEL,
    schemes: Schemes = ALL_PRESETS,
    num_fewshot: Annotated[int | None, typer.Option(help="Worked examples.", show_default="the task's")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents per task.", show_default="all")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with YAML files of more tasks.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    batch: Annotated[int, typer.Option(help="Prompts that are continued together.")] = 8,
    sink: Sink = DEFAULT_SINK,
    threads: Threads = None,
    dtype: Dtype = "float32",
    out: Out = DEFAULT_OUT,
) -> None:
    """Tasks of lm-evaluation-harness, generation and likelihoods, through every scheme's cache."""
    from ...eval.models import quiet

    chosen = names("--tasks", tasks)
    for option, value, least in (("--num-fewshot", num_fewshot, 0), ("--limit", limit, 1), ("--batch", batch, 1)):
        if value is not None:
            at_least(option, value, least)
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path is {include_path}, must be a folder")
    quiet()
    manager = _manager(chosen, include_path)
    from ...eval.lm import PROTOCOL
    from ...eval.scores import compare, evaluate
    from ...eval.task_tables import score_tables

    setup = set_up(model=model, schemes=schemes, baseline=EXACT, sink=sink, threads=threads, dtype=dtype, out=out)
    options: dict[str, Any] = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "task_manager": manager,
        "chat": chat,
    }
    display = setup.bar("requests with one scheme after another")
    try:
        rows = compare(
            setup.schemes,
            setup.baseline,
            lambda scheme: evaluate(
                setup.model, setup.tokenizer, scheme, chosen, setup.results, display.show, batch, **options
            ),
        )
    finally:
        display.close()
    for table in score_tables(model, rows):
        setup.console.print(table)
    packed = all(row.true_bits is not None for row in rows if row.scheme.kind == "packed")
    for note in (
        f"Protocol: {PROTOCOL}.",
        *([] if packed else ["The texts are shorter than the exact window: nothing was packed for some schemes."]),
        f"Numbers: {setup.results.path}",
    ):
        setup.console.print(note, style="dim", highlight=False)


def _manager(tasks: list[str], include_path: Path | None) -> Any:
    """lm-eval's index of tasks, the user's folder included.

    Raises
    ------
    UserError
        For a name that it does not know.
    """
    from lm_eval.tasks import TaskManager

    from ...eval.scores import quiet_harness

    quiet_harness()
    if include_path is not None:  # its own index, of thousands of files, takes seconds
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(f"--tasks: lm-eval does not know {', '.join(unknown)}; `lm-eval ls tasks` lists what it knows")
    return manager
