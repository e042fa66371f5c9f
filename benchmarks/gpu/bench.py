"""What the parts of `gpu.model` share: the model, makers of caches, sizes, and one decode step."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from mixkvq import MixKVQCache
from mixkvq.compat import cache_argument
from mixkvq.errors import UserError
from mixkvq.eval.schemes import parse_scheme

from . import llama
from .record import Log
from .timing import Deadline

DYNAMIC = "DynamicCache"


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    shape: llama.Shape = llama.FULL
    context: int = 32768
    batch: int = 8
    prompt: int = 65536
    chunk: int = 2048
    """Tokens that are handed to a packing cache at a time where as many rows as fit are tried."""
    presets: tuple[str, ...] = ("default", "compact")
    quantized: tuple[str, ...] = ("hqq-4", "quanto-4")
    steps: int = 8
    """Decode steps per turn."""
    rounds: int = 16
    spare: int = 3 << 29
    """Bytes of the device that are not for caches: activations of a step."""


TINY = Sizes(llama.TINY, 300, 2, 400, 200, ("default",), ("hqq-4",), 2, 2)


class Bench:
    """A model on a device, and where results go.

    Attributes
    ----------
    caches : dict
        Makers of empty caches by name.
    weights : int
        Bytes of the model.
    row_bytes : dict
        Bytes of a row of each cache at `Sizes.context`, once known.
    """

    def __init__(self, sizes: Sizes, device: str, log: Log, deadline: Deadline) -> None:
        self.sizes, self.device, self.log, self.deadline = sizes, device, log, deadline
        begin = time.perf_counter()
        self.model = llama.make(sizes.shape, device)
        self.weights = llama.device_bytes(device) or sum(p.nbytes for p in self.model.parameters())
        print(f"model: {self.weights / 1e9:.1f} GB in {time.perf_counter() - begin:.1f} s", flush=True)
        self.caches = self._makers()
        self.row_bytes: dict[str, float] = {}

    def _makers(self) -> dict[str, Callable[[], Any]]:
        config = self.model.config
        made: dict[str, Callable[[], Any]] = {DYNAMIC: lambda: DynamicCache(config=config)}
        for preset in self.sizes.presets:
            made[preset] = lambda preset=preset: MixKVQCache(preset, config=config)
        for name in self.sizes.quantized:
            try:
                scheme = parse_scheme(name)
                scheme.cache(self.model)
            except (UserError, ImportError) as error:
                self.leave_out(f"QuantizedCache {name}", str(error))
                continue
            made[f"QuantizedCache {name}"] = lambda scheme=scheme: scheme.cache(self.model)
        return made

    def leave_out(self, name: str, why: str, **facts: str) -> None:
        """A row and a line about what is not measured."""
        self.log.add("model", name, {}, {"tokens_per_second": None}, why=why, **facts)
        print(f"{name}: left out ({why})", flush=True)

    def where(self, **more: int) -> dict[str, Any]:
        """The model's sizes and more, for a row."""
        shape = self.sizes.shape
        sizes = {"layers": shape.num_hidden_layers, "heads": shape.num_key_value_heads, "head_dim": shape.head_dim}
        return {**sizes, "group": shape.num_attention_heads // shape.num_key_value_heads, **more}

    def fill(self, cache: Any, rows: int, tokens: int, chunk: int = 0) -> int:
        """`llama.fill`, within the time that is left."""
        return llama.fill(cache, self.model, rows, tokens, self.device, self.deadline, chunk)

    def step(self, cache: Any, rows: int) -> None:
        """One decode step of every row."""
        with torch.no_grad():
            self.model(llama.token(rows, self.device), **cache_argument(cache), use_cache=True)

    def held(self) -> int:
        """Bytes that tensors hold on the device."""
        return llama.device_bytes(self.device)

    def extra(self, call: Callable[[], Any]) -> float | None:
        """Most bytes that a call holds on the device above what was held before; None on the CPU."""
        if self.device == "cpu":
            call()
            return None
        before = self.held()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)

    def free(self) -> None:
        """Give unused memory back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
