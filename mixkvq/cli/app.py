"""The commands that need the extra ``demo``: typer reads the command line, rich writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..config import list_presets
from ..errors import missing_package
from ..eval.checkpoints import MODEL_HELP, SMOLLM2
from .bench import app as bench
from .evaluate import app as evaluate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="MixKVQ: query-aware mixed-precision KV cache quantization.",
)

_MODEL = typer.Option("--model", help=MODEL_HELP)
_PRESET = typer.Option("--preset", help=f"One of: {', '.join(list_presets())}.")
_THREADS = typer.Option("--threads", help="Threads of torch.", show_default="as torch chooses")


app.add_typer(evaluate, name="eval")
app.add_typer(bench, name="bench")


@app.command("info", context_settings={"ignore_unknown_options": True, "help_option_names": []})
def _info(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Print what a bug report needs; with --model DIR, which layers of a model are packed, and why."""
    from .info import main

    main(arguments or [])


@app.command("demo")
def _demo(
    model: Annotated[str, _MODEL] = SMOLLM2.name,
    preset: Annotated[str, _PRESET] = "default",
    tokens: Annotated[int, typer.Option(help="Tokens of documentation to read.")] = 5300,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    prefill: Annotated[int, typer.Option(help="Tokens read at once before the comparison starts.")] = 1536,
    threads: Annotated[int | None, _THREADS] = None,
    out: Annotated[Path, typer.Option(help="Folder for demo.png and demo.json.")] = Path("demo-out"),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Answer a question about a long text with DynamicCache and with MixKVQCache, and compare."""
    from .demo import DemoOptions, demo

    demo(DemoOptions(model, preset, tokens, new_tokens, prefill, threads, out, dtype), Console())


@app.command("generate")
def _generate(
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads standard input.')],
    model: Annotated[str, _MODEL] = SMOLLM2.name,
    preset: Annotated[str, _PRESET] = "default",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    threads: Annotated[int | None, _THREADS] = None,
    report: Annotated[bool, typer.Option("--report", help="Print the cache's report at the end.")] = False,
) -> None:
    """Continue a prompt with any model and a quantized cache; the text goes to standard output."""
    from .generate import GenerateOptions, generate

    generate(prompt, GenerateOptions(model, preset, max_new_tokens, temperature, seed, dtype, threads, report))


@app.command("estimate")
def _estimate(
    tokens: Annotated[int, typer.Option(help="Read and generated, per row.")],
    model: Annotated[str, _MODEL] = SMOLLM2.name,
    batch: Annotated[int, typer.Option(help="Rows; beams count as rows.")] = 1,
    preset: Annotated[str | None, typer.Option(help="One preset.", show_default="all")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the model.")] = "auto",
    calibration: Annotated[
        Path | None, typer.Option(help="What `mixkvq calibrate` wrote; for the preset that it is for.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Such as 8GB or 500MiB: also tell how many rows or tokens fit.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a cache will take with every preset; from the configuration alone, no weights are loaded."""
    from .estimate import EstimateOptions, estimate_command

    options = EstimateOptions(model, tokens, batch, preset, dtype, calibration, memory, as_json)
    estimate_command(options, Console())


@app.command("calibrate")
def _calibrate(
    model: Annotated[str, _MODEL] = SMOLLM2.name,
    preset: Annotated[
        str, typer.Option(help="paper: its thresholds; default, compact, near-lossless: a profile over the layers.")
    ] = "paper",
    target_bits: Annotated[
        float | None, typer.Option(help="paper: scale the published pair to this many bits per key code; no trials.")
    ] = None,
    max_bits: Annotated[
        float | None, typer.Option(help="paper: take the trial with the least KL within this many true bits.")
    ] = None,
    trials: Annotated[
        int, typer.Option(help="paper: pairs of thresholds to try, earlier ones counted; 0 only measures the preset's.")
    ] = 30,
    highest: Annotated[
        float, typer.Option(help="paper: largest threshold to try; the published range ends at 2.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    domains: Annotated[
        str, typer.Option(help="prose, code, maths, or paths of text or .jsonl files; separated by commas.")
    ] = "prose,code,maths",
    windows: Annotated[int, typer.Option(help="Windows per domain, others than those of eval.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    prefill: Annotated[int, typer.Option(help="Of these, how many are read at once before the comparison.")] = 1536,
    sink: Annotated[int | None, typer.Option(help="sink_length.", show_default="the preset's")] = None,
    threads: Annotated[int | None, _THREADS] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.json"),
) -> None:
    """Find thresholds or a profile for one model; the file is for MixKVQCache(preset, calibration=FILE)."""
    from .calibrate import CalibrateOptions, calibrate

    options = CalibrateOptions(
        model=model,
        preset=preset,
        target_bits=target_bits,
        max_bits=max_bits,
        trials=trials,
        highest=highest,
        seed=seed,
        domains=domains,
        windows=windows,
        context=context,
        prefill=prefill,
        sink=sink,
        threads=threads,
        dtype=dtype,
        out=out,
    )
    raise typer.Exit(calibrate(options, Console()))


def run(args: Sequence[str]) -> int:
    """Run a command line; returns the exit status.

    Raises
    ------
    UserError
        For what the user can mend: a wrong value, something that is not installed.
    """
    try:
        app(list(args), prog_name="mixkvq")
    except SystemExit as end:  # how typer ends: with the status of the command, or 2 after explaining the usage
        return end.code if isinstance(end.code, int) else 1
    except ModuleNotFoundError as error:
        raise missing_package(error, f"mixkvq {args[0]}") from error
    return 0
