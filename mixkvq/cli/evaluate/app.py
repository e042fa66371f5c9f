"""The typer application of ``mixkvq eval`` and what its commands share: options, the model, the terminal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...config import list_presets
from ...errors import UserError
from ...eval.checkpoints import MODEL_HELP, SMOLLM2
from ...eval.results import Results
from ...eval.schemes import Scheme, parse_scheme, parse_schemes
from ..display import Display

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what a quantized cache does to a model. Every result is kept as a JSON line in the folder --out and "
    "not measured again: an interrupted command goes on where it stopped.",
)

Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
Schemes = Annotated[
    str,
    typer.Option("--schemes", help="Separated by commas, fields behind colons: default,compact:value_bits=3."),
]
Baseline = Annotated[
    str | None, typer.Option("--baseline", help="Scheme that the ratios are taken against. Default: the first.")
]
Sink = Annotated[
    int | None, typer.Option("--sink", help="sink_length of every scheme; -1: each scheme's own.", show_default=True)
]
Threads = Annotated[int | None, typer.Option("--threads", help="Threads of torch.", show_default="as torch chooses")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for results.jsonl and figures.")]
Prompt = Annotated[
    int,
    typer.Option(
        "--prefill",
        help="First tokens, which go into the cache; the queries behind them are compared. Sinks and whole blocks: "
        "4 + 12 * 128.",
    ),
]

ALL_PRESETS = ",".join(name for name in list_presets() if name != "lossless")
DEFAULT_MODEL, DEFAULT_OUT, DEFAULT_SINK, DEFAULT_PROMPT = SMOLLM2.name, Path("eval-out"), 4, 4 + 12 * 128


@dataclass(frozen=True)
class Options:
    """What every command checks first."""

    schemes: list[Scheme]
    baseline: Scheme
    results: Results
    console: Console
    out: Path

    def bar(self, caption: str, layers: str = "reading the text") -> Display:
        """Shows ("chunk", (done, total)) events, and ("layer", ...) ones."""
        return Display(self.console, {"chunk": caption, "layer": layers})


@dataclass(frozen=True)
class Setup(Options):
    """The options and a model."""

    model: Any
    tokenizer: Any


def console() -> Console:
    """Standard output; 160 columns wide where it is no terminal, so that tables are not squeezed in a file."""
    found = Console()
    return found if found.is_terminal or os.environ.get("COLUMNS") else Console(width=160)


def set_threads(threads: int | None) -> None:
    """Set torch's threads, unless None; raises `UserError`."""
    if threads is None:
        return
    if threads < 1:
        raise UserError(f"--threads is {threads}, must be at least 1")
    import torch

    torch.set_num_threads(threads)


def check_options(
    *,
    schemes: str,
    baseline: str | None = None,
    sink: int | None = DEFAULT_SINK,
    threads: int | None = None,
    out: Path = DEFAULT_OUT,
) -> Options:
    """Check the options that need no model, and open the results.

    Raises
    ------
    UserError
        Naming the option.
    """
    common = {} if sink is None or sink < 0 else {"sink_length": sink}
    parsed = parse_schemes(schemes, common)
    base = next((scheme for scheme in parsed if scheme.kind != "exact"), parsed[0])
    if baseline is not None:
        known = {scheme.name: scheme for scheme in parsed}
        base = known.get(baseline) or parse_scheme(baseline, common)
        if baseline not in known:
            parsed = [base, *parsed]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}, must be a folder that can be written ({error.strerror})") from error

    set_threads(threads)
    return Options(parsed, base, Results(out / "results.jsonl"), console(), out)


def set_up(*, model: str, dtype: str = "float32", **options: Any) -> Setup:
    """Check the options (those of `check_options`), then load the model.

    Raises
    ------
    UserError
        Naming the option.
    """
    checked = check_options(**options)
    from ...eval.models import load, quiet

    quiet()
    loaded, tokenizer = load(model, dtype, lambda text: checked.console.print(text, style="dim", highlight=False))
    return Setup(**vars(checked), model=loaded, tokenizer=tokenizer)
