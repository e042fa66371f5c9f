"""``mixkvq bench``: how fast attention, whole steps and decoding are, against rivals in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..config import list_presets
from ..errors import UserError
from ..eval.checkpoints import MODEL_HELP, SMOLLM2
from .display import Display
from .evaluate.app import console
from .info import collect, usable_cpus

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed. Everything that is compared takes turns in one run; rows are kept as JSON lines in the folder "
    "--out, where a run replaces the last one, with a figure beside them. See benchmarks/README.md for how to read.",
)

_Cpu = Annotated[
    bool,
    typer.Option(
        "--cpu-time", help="Time that the thread computes, not time that passes: for busy machines, 1 thread."
    ),
]
_Out = Annotated[Path, typer.Option("--out", help="Folder for the JSON lines and the figure.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Fewer and shorter cases: less than a minute.")]
_Presets = Annotated[str, typer.Option("--presets", help=f"Of {', '.join(list_presets())}; separated by commas.")]
_Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")]
_DEFAULT_OUT = Path("bench-out")
_QUIET = 0.05
"""Share of timed calls that may lose the processor before a run says so."""


def _numbers(option: str, text: str, low: int = 1) -> tuple[int, ...]:
    """Numbers separated by commas, ascending, each once."""
    try:
        found = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or found[0] < low:
        raise UserError(f"{option} is {text!r}, must be numbers from {low} on, separated by commas")
    return tuple(found)


def _split(text: str) -> list[str]:
    """Names separated by commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _names(option: str, text: str, allowed: Sequence[str]) -> tuple[str, ...]:
    """Names separated by commas, each once."""
    found = tuple(dict.fromkeys(_split(text)))
    if not found or any(name not in allowed for name in found):
        raise UserError(f"{option} is {text!r}, must be of {', '.join(allowed)}, separated by commas")
    return found


def _threads(text: str | None) -> tuple[int, ...]:
    usable = usable_cpus()
    found = _numbers("--threads", text or ("1,2" if usable > 1 else "1"))
    if found[-1] > usable:
        raise UserError(f"--threads is {text!r}, must be at most {usable}, the processors that may be used")
    return found


def _clock(cpu_time: bool, threads: tuple[int, ...]) -> str:
    if cpu_time and threads != (1,):
        raise UserError(f"--threads is {','.join(map(str, threads))}, must be 1 with --cpu-time")
    return "cpu" if cpu_time else "wall"


def _machine(threads: tuple[int, ...], clock: str) -> dict[str, Any]:
    from ..bench.machine import measure

    return {**collect(), **measure(threads, clock)}


def _about(machine: dict[str, Any]) -> str:
    return f"{machine['CPU']}, {machine['CPUs usable']} processors, kernels {machine.get('isa chosen', '?')}"


def _print(to: Console, machine: dict[str, Any], rows: Sequence[Any], sheets: Sequence[Any], *, markdown: bool) -> None:
    preempted = sum(row.facts.get("preempted", 0) for row in rows)
    calls = sum(len(row.taken) for row in rows if "preempted" in row.facts)
    rates = ", ".join(f"{rate / 1e9:.1f} GB/s with {n} thread(s)" for n, rate in machine["read rate"].items())
    for sheet in sheets:
        if markdown:
            print(sheet.markdown() + "\n")
        else:
            to.print(sheet.rich())
    lines = (
        f"{_about(machine)}; torch {machine['torch']}; load average at the start {machine['load average']:.2f}",
        f"Read rate: {rates}. Last-level cache: {machine['last level cache'] / 2**20:.0f} MiB.",
    )
    for line in lines:
        to.print(line, style="dim", highlight=False, soft_wrap=True)
    share, cpu = preempted / max(calls, 1), machine["clock"] == "cpu"
    bad = share > _QUIET and not cpu
    to.print(
        f"Timed calls that lost the processor to other programs: {100 * share:.1f} %."
        + (" Times are of the computing thread." if cpu else "")
        + (" Long calls suffer more: ratios are too high; wait for an idle machine, or use --cpu-time." if bad else ""),
        style="bold red" if bad else "dim",
        highlight=False,
        soft_wrap=True,
    )


def _finish(to: Console, log: Any, machine: dict[str, Any], bench: str, *, markdown: bool) -> None:
    """Tables and figure of a log."""
    sheets, figure = _REPORTS[bench]()
    _print(to, machine, log.rows, sheets(log.rows, machine), markdown=markdown)
    picture = log.path.with_suffix(".png")
    figure(picture, log.rows, _about(machine))
    to.print(f"Rows: {log.path}\nFigure: {picture}", style="dim", highlight=False)


def _kernels_report() -> tuple[Any, Any]:
    from ..bench import figures, kernel_tables

    return kernel_tables.sheets, figures.kernels


def _step_report() -> tuple[Any, Any]:
    from ..bench import figures, step_tables

    return step_tables.sheets, figures.step


def _tokens_report() -> tuple[Any, Any]:
    from ..bench import figures, token_tables

    return token_tables.sheets, figures.tokens


_REPORTS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "kernels": _kernels_report,
    "step": _step_report,
    "tokens": _tokens_report,
}


def _measure(
    bench: str, out: Path, threads: tuple[int, ...], clock: str, run: Callable[[Any, Any], None], *, markdown: bool
) -> None:
    """Run a benchmark with a bar on the terminal, then print what it found."""
    from ..bench.rows import Log

    to = console()
    machine = _machine(threads, clock)
    log = Log(out / f"{bench}.jsonl", machine)
    display = Display(to, {"chunk": "taking turns"})
    try:
        run(log, display.show)
    finally:
        display.close()
    _finish(to, log, machine, bench, markdown=markdown)


@app.command("kernels")
def kernels(
    presets: _Presets = "compact,default",
    precisions: Annotated[str, typer.Option(help="Of default, exact and fast.")] = "default,exact",
    head_dims: Annotated[str | None, typer.Option(help="Of keys and values.", show_default="64,128")] = None,
    groups: Annotated[str | None, typer.Option(help="Query heads per KV head.", show_default="1,4,8")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of the history.", show_default="256,1024,4096,32768,131072")
    ] = None,
    threads: Annotated[str | None, typer.Option(help="Threads of torch's pool.", show_default="1,2")] = None,
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    seconds: Annotated[float | None, typer.Option(help="Of timing per combination.", show_default="2")] = None,
    cpu_time: _Cpu = False,
    quick: _Quick = False,
    out: _Out = _DEFAULT_OUT,
    markdown: _Markdown = False,
) -> None:
    """Attention of one decode step over packed records, against torch and the core's own kernel on plain tensors."""
    from ..bench.check import BOUNDS
    from ..bench.kernels import BENCH, Grid, run

    dims, sizes, lengths = ("128", "1,4", "256,4096") if quick else ("64,128", "1,4,8", "256,1024,4096,32768,131072")
    count = _threads(threads or ("1" if quick or cpu_time else None))
    clock = _clock(cpu_time, count)
    if heads < 1:
        raise UserError(f"--heads is {heads}, must be at least 1")
    grid = Grid(
        presets=_names("--presets", presets, list_presets()),
        precisions=_names("--precisions", precisions, tuple(BOUNDS)),
        head_dims=_numbers("--head-dims", head_dims or dims, 8),
        groups=_numbers("--groups", groups or sizes),
        tokens=_numbers("--tokens", tokens or lengths),
        threads=count,
        heads=heads,
        clock=clock,
        seconds=(1.0 if quick else 2.0) if seconds is None else seconds,
    )
    _measure(BENCH, out, count, clock, lambda log, emit: run(grid, log, emit), markdown=markdown)


@app.command("step")
def step(
    schemes: Annotated[
        str | None,
        typer.Option(
            "--schemes",
            help="Caches as in `mixkvq eval`, and exact-eager; separated by commas.",
            show_default="compact,default,exact,exact-eager, and hqq-2,quanto-2 where installed",
        ),
    ] = None,
    head_dims: Annotated[str | None, typer.Option(help="Of keys and values.", show_default="64,128")] = None,
    groups: Annotated[str | None, typer.Option(help="Query heads per KV head.", show_default="1,4,8")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="In the cache when the first step begins.", show_default="1024,4096,32768")
    ] = None,
    slow_tokens: Annotated[int, typer.Option(help="Longest history for exact-eager, hqq and quanto.")] = 4096,
    threads: Annotated[str | None, typer.Option(help="Threads of torch's pool.", show_default="1,2")] = None,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 2,
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    seconds: Annotated[float | None, typer.Option(help="Of timing per combination.", show_default="2")] = None,
    cpu_time: _Cpu = False,
    quick: _Quick = False,
    out: _Out = _DEFAULT_OUT,
    markdown: _Markdown = False,
) -> None:
    """A whole decode step of a small random Llama, with our caches and those of transformers."""
    from ..bench.step import BENCH, SCHEMES, Grid, parse, run
    from ..eval.models import quiet

    quiet()
    dims, sizes, lengths = ("128", "4", "1024,4096") if quick else ("64,128", "1,4,8", "1024,4096,32768")
    count = _threads(threads or ("1" if quick or cpu_time else None))
    clock = _clock(cpu_time, count)
    for name, value in (("--layers", layers), ("--heads", heads)):
        if value < 1:
            raise UserError(f"{name} is {value}, must be at least 1")
    names = SCHEMES if schemes is None else _split(schemes)
    grid = Grid(
        schemes=parse(names, skip=schemes is None, say=lambda text: console().print(text, style="dim")),
        head_dims=_numbers("--head-dims", head_dims or dims, 8),
        groups=_numbers("--groups", groups or sizes),
        tokens=_numbers("--tokens", tokens or lengths, 2),
        threads=count,
        slow_tokens=slow_tokens,
        layers=layers,
        heads=heads,
        clock=clock,
        seconds=(1.0 if quick else 2.0) if seconds is None else seconds,
    )
    _measure(BENCH, out, count, clock, lambda log, emit: run(grid, log, emit), markdown=markdown)


@app.command("tokens")
def tokens(
    model: Annotated[str, typer.Option("--model", help=MODEL_HELP)] = SMOLLM2.name,
    schemes: Annotated[
        str, typer.Option("--schemes", help="Caches as in `mixkvq eval`, separated by commas.")
    ] = "default,exact",
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of the prompts.", show_default="64,256,1024,2048,4096,8192")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Decoded behind each prompt.", show_default="64")] = None,
    flush_tokens: Annotated[
        int | None, typer.Option(help="Prompt behind which steps that pack are waited for.", show_default="4096")
    ] = None,
    flushes: Annotated[int | None, typer.Option(help="How many; 0: none.", show_default="8")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch.", show_default="2, or all there are")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    cpu_time: _Cpu = False,
    quick: _Quick = False,
    out: _Out = _DEFAULT_OUT,
    markdown: _Markdown = False,
) -> None:
    """Tokens per second on a real model and real text: reading the prompt, decoding, and the steps that pack."""
    from ..bench.step import parse
    from ..bench.tokens import BENCH, Plan, run
    from ..eval.models import load

    count = _threads(str(threads or (1 if cpu_time else min(2, usable_cpus()))))
    clock = _clock(cpu_time, count)
    lengths, few = ("64,1024", 2) if quick else ("64,256,1024,2048,4096,8192", 8)
    for name, value, low in (("--steps", steps, 1), ("--flush-tokens", flush_tokens, 1), ("--flushes", flushes, 0)):
        if value is not None and value < low:
            raise UserError(f"{name} is {value}, must be at least {low}")
    to = console()
    plan = Plan(
        schemes=parse(_split(schemes), skip=False, say=print),
        tokens=_numbers("--tokens", tokens or lengths),
        steps=steps or (32 if quick else 64),
        flush_tokens=flush_tokens or (1024 if quick else 4096),
        flushes=few if flushes is None else flushes,
        repeats=3 if quick else 5,
        threads=count[0],
        clock=clock,
    )
    loaded, tokenizer = load(model, dtype, lambda text: to.print(text, style="dim", highlight=False))
    _measure(BENCH, out, count, clock, lambda log, emit: run(plan, loaded, tokenizer, log, emit), markdown=markdown)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="JSON lines of one of the commands.")], markdown: _Markdown = False
) -> None:
    """Print the tables of a run again."""
    from ..bench.rows import read

    machine, rows = read(file)
    if not rows or rows[0].bench not in _REPORTS:
        raise UserError(f"{file} holds no rows of {', '.join(_REPORTS)}")
    sheets, _ = _REPORTS[rows[0].bench]()
    _print(console(), machine, rows, sheets(rows, machine), markdown=markdown)
