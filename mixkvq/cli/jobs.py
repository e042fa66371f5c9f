"""The demo's measurements, each in a process of its own, so that one's memory and caches do not colour the next."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ..errors import UserError, missing_package

TEMPLATE_ROOM = 128
"""Tokens left for the question and the chat template."""


@dataclass(frozen=True)
class Job:
    """What to run; plain data, sent to the new process."""

    kind: str
    """"answer": generate an answer with one cache; "score": compare a preset with the exact cache; "prepare": only see
    to it that the model can be loaded, so that converting it colours no measurement."""
    model: str
    dtype: str
    preset: str | None
    """None: transformers' DynamicCache."""
    tokens: int
    """Of documentation to read."""
    threads: int | None
    new_tokens: int = 0
    prefill: int = 0
    """Of `tokens`, how many are read before the first scored position."""


def run(job: Job) -> Iterator[tuple[str, Any]]:
    """Run a job in a new process; yields its events (see `mixkvq.eval.stream.Emit`), last ("result", object).

    Raises
    ------
    UserError
        With the message of a `UserError` in the process, or saying how it ended.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender), daemon=True)
    process.start()
    sender.close()  # ours; the child's end closes with the child
    finished = False
    try:
        while True:
            try:
                event, value = receiver.recv()
            except EOFError:
                break
            if event == "error":
                raise UserError(value)
            finished = event == "result"
            yield event, value
        process.join()
        if not finished:
            code = process.exitcode
            reason = "killed: out of memory?" if code == -9 else f"exit status {code}, see above"
            raise UserError(f"measuring {job.preset or 'DynamicCache'} failed ({reason})")
    finally:
        if process.is_alive():
            process.terminate()
        process.join()
        receiver.close()


def _child(job: Job, sender: Connection) -> None:
    def emit(event: str, value: Any) -> None:
        sender.send((event, value))

    try:
        emit("result", perform(job, emit))
    except ModuleNotFoundError as error:
        emit("error", str(missing_package(error, "this command")))
        raise
    except UserError as error:
        emit("error", str(error))
    finally:
        sender.close()


def perform(job: Job, emit: Any) -> dict[str, Any]:
    """Do a job in this process. Returns what the demo shows.

    Returns
    -------
    dict
        "answer" (an `Answer`) or "score" (a `Score`); "bits" (a `CacheBits` or None); for "answer" also "bf16_bytes",
        what a bf16 `DynamicCache` takes for as many tokens. Empty for "prepare".
    """
    import torch
    from transformers import DynamicCache

    from ..eval.memory import bf16_nbytes
    from ..eval.models import load, prepare
    from ..eval.tiers import cache_bits
    from .answer import answer
    from .score import teacher_forced
    from .text import question_ids, text_ids

    if job.kind == "prepare":
        prepare(job.model, lambda text: emit("say", text))
        return {}
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    model, tokenizer = load(job.model, job.dtype, lambda text: emit("say", text))
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and job.tokens + job.new_tokens + TEMPLATE_ROOM > limit:
        room = limit - job.new_tokens - TEMPLATE_ROOM
        raise UserError(f"--tokens is {job.tokens}, must be at most {room}: {job.model} reads {limit} tokens")
    if job.preset is None:
        cache: Any = DynamicCache(config=model.config)
    else:
        from .. import MixKVQCache

        cache = MixKVQCache(job.preset, config=model.config)
    if job.kind == "answer":
        ids = question_ids(tokenizer, job.tokens)
        with torch.inference_mode():  # weights are mapped from their file: the first pass brings them into memory
            model(ids[:, :16], use_cache=False)
        result = answer(model, tokenizer, ids, cache, emit, max_new_tokens=job.new_tokens, do_sample=False)
        bits = cache_bits(cache) if job.preset else None
        return {"answer": result, "bits": bits, "bf16_bytes": bf16_nbytes(model.config, result.cache_tokens)}
    if job.kind != "score" or job.preset is None:
        raise ValueError(f"job is {job}, must be an answer, or a score with a preset")
    from ..config import MixKVQConfig

    config = MixKVQConfig.preset(job.preset)
    text = torch.tensor([text_ids(tokenizer, job.tokens)])
    exact = DynamicCache(config=model.config)
    score = teacher_forced(model, text, job.prefill, exact, cache, config.sink_length, config.block_length, emit)
    return {"score": score, "bits": cache_bits(cache)}
