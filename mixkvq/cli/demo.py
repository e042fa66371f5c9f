"""``mixkvq demo``: one real model, one long prompt, two caches, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import MixKVQConfig
from ..errors import UserError
from ..eval.checkpoints import CHECKPOINTS, SMOLLM2
from .display import Display
from .info import collect
from .jobs import Job, run
from .plots import demo_figure
from .table import footnotes, render, result
from .text import QUESTION


@dataclass(frozen=True)
class DemoOptions:
    """Options of the command; the fields are explained in `mixkvq.cli.app`."""

    model: str = SMOLLM2.name
    preset: str = "default"
    tokens: int = 5300
    new_tokens: int = 128
    prefill: int = 1536
    threads: int | None = None
    out: Path = Path("demo-out")
    dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            MixKVQConfig.preset(self.preset)
        except ValueError as error:
            raise UserError(f"--preset: {error}") from error
        for name, low in (("new_tokens", 2), ("prefill", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"--{name.replace('_', '-')} is {value}, must be at least {low}")
        if self.tokens <= self.prefill:
            raise UserError(f"--tokens is {self.tokens}, must be more than --prefill ({self.prefill})")

    def job(self, kind: str, preset: str | None) -> Job:
        """One of the demo's jobs."""
        return Job(
            kind=kind,
            model=self.model,
            dtype=self.dtype,
            preset=preset,
            tokens=self.tokens,
            threads=self.threads,
            new_tokens=self.new_tokens,
            prefill=self.prefill,
        )


def demo(options: DemoOptions, console: Console) -> dict[str, Any]:
    """Run the demo; writes ``demo.png`` and ``demo.json`` into ``options.out`` and returns what the JSON holds.

    Raises
    ------
    UserError
        When the model is missing, the folder cannot be written, or a measurement fails.
    """
    checkpoint = CHECKPOINTS.get(options.model)
    if checkpoint:
        checkpoint.require()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {options.out}, must be a folder that can be written ({error.strerror})") from error

    if checkpoint:
        Display(console, {}).follow(run(options.job("prepare", None)))
    read = {"layer": "reading the prompt, layer by layer"}
    console.rule(f"DynamicCache, {options.dtype}")
    console.print(f"Prompt: about {options.tokens} tokens of the Python documentation, then:", highlight=False)
    console.print(f"{QUESTION}\n", style="bold", highlight=False)
    exact = Display(console, read).follow(run(options.job("answer", None)))
    console.rule(f"MixKVQCache, {options.preset}")
    ours = Display(console, read).follow(run(options.job("answer", options.preset)))
    console.rule("Teacher-forced comparison")
    forced = {"layer": read["layer"], "chunk": "comparing the next tokens"}
    compared = Display(console, forced).follow(run(options.job("score", options.preset)))

    numbers = result(exact, ours, compared["score"])
    picture, table = options.out / "demo.png", options.out / "demo.json"
    demo_figure(
        picture,
        compared["score"].trace,
        compared["bits"].per_channel,
        model=checkpoint.title if checkpoint else options.model,
        dtype=options.dtype,
        preset=options.preset,
    )
    numbers |= {"options": {**asdict(options), "out": str(options.out)}, "info": collect()}
    table.write_text(json.dumps(numbers, indent=1, default=str) + "\n")
    console.print()
    console.print(render(numbers, dtype=options.dtype, preset=options.preset))
    for note in footnotes(numbers):
        console.print(note, style="dim", highlight=False)
    console.print(f"\nFigure: {picture}\nNumbers: {table}", highlight=False)
    return numbers
