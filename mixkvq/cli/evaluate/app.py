"""The typer application of ``mixkvq eval`` and what its commands share: options, the model, the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...config import list_presets
from ...errors import UserError
from ...eval.models import SMOLLM2
from ...eval.results import Results
from ...eval.schemes import Scheme, parse_scheme, parse_schemes
from ..display import Display

app = typer.Typer(
    no_args_is_help=True,
    help="Measure what a quantized cache does to a model. Every result is kept as a JSON line in the folder --out and "
    "not measured again: an interrupted command goes on where it stopped.",
)

Model = Annotated[str, typer.Option("--model", help="smollm2, a folder, or a name on a model hub.")]
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

ALL_PRESETS = ",".join(name for name in list_presets() if name != "lossless")
DEFAULT_MODEL, DEFAULT_OUT, DEFAULT_SINK = SMOLLM2, Path("eval-out"), 4


@dataclass(frozen=True)
class Setup:
    """What every command begins with."""

    model: Any
    tokenizer: Any
    schemes: list[Scheme]
    baseline: Scheme
    results: Results
    console: Console
    out: Path

    def bar(self, caption: str) -> Display:
        """Shows ("chunk", (done, total)) events."""
        return Display(self.console, {"chunk": caption})


def set_up(
    *,
    model: str,
    schemes: str,
    baseline: str | None = None,
    sink: int | None = DEFAULT_SINK,
    threads: int | None = None,
    dtype: str = "float32",
    out: Path = DEFAULT_OUT,
) -> Setup:
    """Check the options, then load the model.

    Raises
    ------
    UserError
        Naming the option.
    """
    console = Console()
    common = {} if sink is None or sink < 0 else {"sink_length": sink}
    parsed = parse_schemes(schemes, common)
    base = parsed[0]
    if baseline is not None:
        known = {scheme.name: scheme for scheme in parsed}
        base = known.get(baseline) or parse_scheme(baseline, common)
        if baseline not in known:
            parsed = [base, *parsed]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {out}, must be a folder that can be written ({error.strerror})") from error
    results = Results(out / "results.jsonl")

    from ...eval.models import load, quiet

    quiet()

    import torch

    if threads is not None:
        if threads < 1:
            raise UserError(f"--threads is {threads}, must be at least 1")
        torch.set_num_threads(threads)
    loaded, tokenizer = load(model, dtype, lambda text: console.print(text, style="dim", highlight=False))
    return Setup(loaded, tokenizer, parsed, base, results, console, out)
