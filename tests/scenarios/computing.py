"""Ways of running a model: precision, recording, gradients, compilation, several at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import models
import torch

from mixkvq import MixKVQCache
from mixkvq.report import tensors_in

from .case import Case, scenario

KINDS = ("llama", "gemma2", "qwen3_next", "bloom", "deepseek_v3")
"""One family for every path and kind of layer, for what does not depend on more."""


def _in_inference_mode(case: Case, steps: Callable[[int], bool]) -> None:
    def run(cache):
        reader = case.reader(cache)
        for step, piece in enumerate((60, 30, 1, 40, 19, 1, 1)):
            with torch.inference_mode(steps(step)):
                reader.read(piece)
        return [logits.clone() for logits in reader.logits]

    case.compare(run)


@scenario()
def inference_mode(case: Case) -> None:
    with torch.inference_mode():
        _in_inference_mode(case, lambda step: True)


@scenario()
def inference_mode_now_and_then(case: Case) -> None:
    _in_inference_mode(case, lambda step: step % 2 == 0)


@scenario()
def autocast(case: Case) -> None:
    """A float32 model then has float32 keys and bfloat16 values, and computes attention with both in bfloat16."""

    def run(cache):
        reader = case.reader(cache, [90, 53])
        reader.steps(6)
        return [logits.float() for logits in reader.logits]

    with torch.autocast("cpu", torch.bfloat16):
        case.compare(run, tolerance=0.1)


@scenario()
def attention_weights_and_hidden_states(case: Case) -> None:
    recorded = []

    def run(cache):
        got = case.generate(case.inputs([60]), cache, 5, output_attentions=True, output_hidden_states=True)
        names = [name for name in got if name.endswith(("attentions", "hidden_states")) and got[name] is not None]
        recorded.append([t.flatten() for name in names for step in got[name] for t in step if t is not None])
        return got

    case.compare(run)
    want, lossless = recorded[:2]
    assert want
    for a, b in zip(want, lossless, strict=True):
        assert float((b - a).abs().max()) <= 1e-5 * float(a.abs().max())


@scenario()
def gradients_through_the_prompt(case: Case) -> None:
    graded = []

    def run(cache):
        reader = case.reader(cache)
        parameters = [p for p in case.model.parameters() if p.requires_grad]
        try:
            reader.read(60, gradients=True)
            reader.read(30, gradients=True)
            graded.append(_graded(case, cache))
            reader.logits[1].square().mean().backward()
            gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        finally:
            case.model.zero_grad()
        return [*(logits.detach() for logits in reader.logits), gradients.view(1, -1)]

    for cache in case.compare(run):
        _assert_native_where(graded[0], cache)


@scenario()
def gradients_after_packing(case: Case) -> None:
    """A packed layer goes on in full precision when gradients are wanted."""
    graded = []

    def run(cache):
        reader = case.reader(cache, [80, 53])
        reader.read(5, gradients=True)
        graded.append(_graded(case, cache))
        reader.steps(3)
        return [logits.detach() for logits in reader.logits]

    for cache in case.compare(run):
        _assert_native_where(graded[0], cache)


def _graded(case: Case, cache: Any) -> list[bool]:
    """Layers that hold keys with gradients: all, but for models that compute some layers without (HRM)."""
    layers = case.ours(cache).layers
    return [any(held.requires_grad for held in tensors_in(vars(layer))) for layer in layers]


def _assert_native_where(graded: list[bool], cache: MixKVQCache) -> None:
    """Layers that hold gradients in the stock cache, which was first, are in full precision in ours."""
    assert any(graded)
    assert all(path == "native" for path, wanted in zip(models.paths(cache), graded, strict=True) if wanted)


@scenario(families=("llama", "gemma2", "qwen3_next"), slow=True)
def compiled_by_the_user(case: Case) -> None:
    """All of it, or after an eager prompt."""

    def run(cache):
        torch.compiler.reset()
        compiled = torch.compile(case.model, backend="eager")
        readers = case.reader(cache), case.reader(copy.deepcopy(cache))
        for reader, prompt in zip(readers, (compiled, case.model), strict=True):
            for size, model in ((70, prompt), *[(1, compiled)] * 4):
                reader.read(size, model=model)
        return [logits for reader in readers for logits in reader.logits]

    case.compare(run, books=False)  # a compiled prompt does not tell the layout: sliding layers keep everything


@scenario(families=KINDS)
def two_models_interleaved(case: Case) -> None:
    def run(cache):
        readers = case.reader(cache), case.reader(copy.deepcopy(cache))
        for size in (50, 1, 39, *[1] * 12):
            for reader, model in zip(readers, (case.model, case.another_model()), strict=True):
                reader.read(size, model=model)
        return [logits for reader in readers for logits in reader.logits]

    case.compare(run)


@scenario(families=KINDS)
def four_threads_with_a_cache_each(case: Case) -> None:
    def run(cache):
        caches = [cache, *(copy.deepcopy(cache) for _ in range(3))]
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(case.generate, case.inputs([70 + i, 30], i), c, 12) for i, c in enumerate(caches)]
            return [job.result() for job in jobs]

    case.compare(run)
