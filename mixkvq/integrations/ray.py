"""Many prompts on many machines: a map over a Ray dataset with an actor pool, one model per actor.

Needs the extra: ``pip install 'mixkvq[ray]'``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import install_line

try:
    import pyarrow
    import ray
    import ray.data
    from transformers.utils import logging as transformers_logging
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] == "mixkvq":
        raise
    raise ImportError(f"mixkvq.integrations.ray needs {error.name}: {install_line('ray')}") from error

from ..config import MixKVQConfig
from ..estimates import estimate
from .batches import Answer, BatchGenerator, BatchSettings, check_count, weight_bytes
from .capacity import Need, Node, workers_that_fit

PROCESS_BYTES = 1 << 30
"""Bytes that an actor is taken to need besides weights and cache: the interpreter, torch, the activations."""


def generate(
    dataset: ray.data.Dataset,
    model: str,
    *,
    preset: str | MixKVQConfig = "default",
    column: str = "prompt",
    output_column: str = "generated",
    error_column: str | None = None,
    stats_column: str | None = None,
    apply_chat_template: bool = False,
    max_new_tokens: int = 256,
    max_prompt_tokens: int | None = None,
    batch_size: int = 8,
    concurrency: int | None = None,
    num_cpus: float = 1,
    process_bytes: int = PROCESS_BYTES,
    dtype: str = "auto",
    seed: int = 0,
    generate_options: Mapping[str, Any] | None = None,
    cache_options: Mapping[str, Any] | None = None,
) -> ray.data.Dataset:
    """Answer every prompt of a dataset, with one fresh `MixKVQCache` per batch.

    As many actors run as the cluster has memory and CPUs for, each with a model of its own; one CPU of the cluster
    stays free for the tasks of Ray Data that read and write. Ray starts an actor that died again and repeats its batch.
    Nothing runs before the result is consumed.

    Parameters
    ----------
    dataset : ray.data.Dataset
        Rows with a column of prompts; all other columns are kept as they are. Rows come back in Ray's order, which is
        the dataset's only with ``DataContext.get_current().execution_options.preserve_order = True``.
    model : str
        A folder that every node can read, or a name on a model hub. It runs on the CPU.
    preset : str or MixKVQConfig
    column, output_column : str
        Of the prompts and of the answers, which hold neither the prompt nor special tokens.
    error_column : str, optional
        Of what is wrong with a prompt: it is no string, empty or too long. Other rows have None there, and these have
        None in `output_column`. Without it the run stops at such a prompt with an error that shows its row.
    stats_column : str, optional
        Of a struct: ``node`` and ``actor`` (Ray's ids), ``process``, ``batch`` (number of the batch in its process),
        ``prompt_tokens``, ``new_tokens``, and of the whole batch ``cache_bytes`` (``report().nbytes`` of the cache at
        the end) and ``seconds``.
    apply_chat_template : bool
        Whether a prompt is a user's message for the model's chat template; else it is continued as it is.
    max_new_tokens : int
    max_prompt_tokens : int, optional
        What memory is reserved for; by default the model's positions less `max_new_tokens`, which is much for models
        with long contexts.
    batch_size : int
        Prompts per cache. A greedy answer does not depend on what else is in its batch but for rounding.
    concurrency : int, optional
        At most this many actors; by default as many as fit.
    num_cpus : float
        CPUs of an actor, which are also torch's threads.
    process_bytes : int
        Bytes of an actor besides weights and cache. The sum of the three is the ``memory`` that Ray reserves.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        Of the weights.
    seed : int
        For sampling: with the same seed and the same prompts in a batch come the same answers.
    generate_options : mapping, optional
        More arguments of the model's ``generate``, such as ``{"do_sample": True}``; greedy otherwise.
    cache_options : mapping, optional
        More arguments of `MixKVQCache`, such as ``{"calibration": "found.json"}``.

    Returns
    -------
    ray.data.Dataset

    Raises
    ------
    TypeError, ValueError
        For a wrong argument, or if not even one actor fits: with what it needs and what the cluster has.

    Examples
    --------
    >>> prompts = ray.data.read_json("prompts.jsonl")
    >>> generate(prompts, "path/to/model", max_prompt_tokens=2000).write_json("answers")
    """
    columns = [column, output_column, *(name for name in (error_column, stats_column) if name is not None)]
    if len(set(columns)) < len(columns) or not all(isinstance(name, str) and name for name in columns):
        raise ValueError(
            f"column, output_column, error_column, stats_column are {column!r}, {output_column!r}, {error_column!r}, "
            f"{stats_column!r}, must be different names"
        )
    check_count("batch_size", batch_size)
    if concurrency is not None:
        check_count("concurrency", concurrency)
    settings = BatchSettings(
        model,
        preset,
        dtype,
        max_new_tokens,
        max_prompt_tokens,
        apply_chat_template,
        seed,
        dict(generate_options or {}),
        dict(cache_options or {}),
    )
    need = actor_need(settings, batch_size=batch_size, num_cpus=num_cpus, process_bytes=process_bytes)
    fit = workers_that_fit(need, cluster_nodes())
    # One block is one task: what Ray repeats when an actor dies, and what it deals out to actors.
    blocks = dataset.repartition(target_num_rows_per_block=batch_size, strict=True)
    return blocks.map_batches(
        GenerateActor,
        fn_constructor_args=(settings, column, output_column, error_column, stats_column),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            size=fit if concurrency is None else min(fit, concurrency),
            max_tasks_in_flight_per_actor=2,  # one runs, one waits: the last batches are dealt out evenly
        ),
        num_cpus=num_cpus,
        memory=need.memory,
        udf_modifying_row_count=False,
    )


def actor_need(
    settings: BatchSettings, *, batch_size: int, num_cpus: float = 1, process_bytes: int = PROCESS_BYTES
) -> Need:
    """What an actor reserves, before anything is loaded but the model's configuration.

    Raises
    ------
    TypeError, ValueError
        For settings that the model or the cache refuses.
    """
    if isinstance(num_cpus, bool) or not isinstance(num_cpus, (int, float)) or not num_cpus >= 0:
        raise ValueError(f"num_cpus is {num_cpus!r}, must be a number of 0 or more")
    if type(process_bytes) is not int or process_bytes < 0:
        raise ValueError(f"process_bytes is {process_bytes!r}, must be an int of 0 or more")
    config = settings.model_config()
    prompt = settings.prompt_limit(config)
    settings.fresh_cache(config)  # refuses wrong options here, not in an actor
    cache = estimate(
        config,
        tokens=prompt + settings.max_new_tokens - 1,  # the last token is written, not read
        prompt=prompt,
        batch=batch_size * int(settings.generate_options.get("num_beams", 1)),
        preset=settings.preset,
        dtype=None if settings.dtype == "auto" else settings.dtype,
        **{name: value for name, value in settings.cache_options.items() if name not in ("precision", "offloading")},
    )
    return Need(weight_bytes(config, settings.dtype), cache.most_peak_nbytes, process_bytes, num_cpus)


def cluster_nodes() -> list[Node]:
    """Memory and CPUs of the living nodes of the cluster that this process is connected to, or of a local one."""
    if not ray.is_initialized():
        ray.init()
    return [
        Node(node["NodeManagerHostname"], int(resources.get("memory", 0)), resources.get("CPU", 0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and (resources := node["Resources"])
    ]


class GenerateActor:
    """What an actor of `generate` runs: a model that adds columns to one batch after the other."""

    def __init__(
        self,
        settings: BatchSettings,
        column: str,
        output_column: str,
        error_column: str | None,
        stats_column: str | None,
    ) -> None:
        self.column, self.output_column = column, output_column
        self.error_column, self.stats_column = error_column, stats_column
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.generator = BatchGenerator(settings)
        self.batches = 0

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        """The same rows with the columns of the answers."""
        self._check_columns(batch.column_names)
        started = time.perf_counter()
        encoded = self.generator.encode(batch[self.column].to_pylist())
        errors = [f"{self.column} {wrong}" if isinstance(wrong, str) else None for wrong in encoded]
        if self.error_column is None and any(errors):
            self._refuse(batch, errors)
        answers, nbytes = self.generator.answer([ids for ids in encoded if not isinstance(ids, str)])
        self.batches += 1
        remaining = iter(answers)
        rows = [None if error else next(remaining) for error in errors]
        new: dict[str, tuple[list[Any], pyarrow.DataType]] = {
            self.output_column: ([row and row.text for row in rows], pyarrow.string())
        }
        if self.error_column is not None:
            new[self.error_column] = (errors, pyarrow.string())
        if self.stats_column is not None:
            new[self.stats_column] = (self._stats(rows, nbytes, time.perf_counter() - started), _STATS)
        for name, (values, kind) in new.items():
            batch = batch.append_column(name, pyarrow.array(values, kind))
        return batch

    def _stats(self, rows: list[Answer | None], nbytes: int, seconds: float) -> list[dict[str, Any]]:
        here = ray.get_runtime_context()
        of_batch = {
            "node": here.get_node_id(),
            "actor": here.get_actor_id(),
            "process": os.getpid(),
            "batch": self.batches,
            "cache_bytes": nbytes,
            "seconds": seconds,
        }
        return [
            {**of_batch, "prompt_tokens": row.prompt_tokens if row else 0, "new_tokens": row.new_tokens if row else 0}
            for row in rows
        ]

    def _refuse(self, batch: pyarrow.Table, errors: list[str | None]) -> NoReturn:
        error, index = next((text, i) for i, text in enumerate(errors) if text)
        row = repr(batch.slice(index, 1).to_pylist()[0])
        raise ValueError(f"{error}, in the row {row[:500]}: filter the dataset, or name an error_column")

    def _check_columns(self, have: list[str]) -> None:
        if self.column not in have:
            raise ValueError(f"column is {self.column!r}, must be one of the dataset's: {', '.join(have)}")
        for argument in ("output_column", "error_column", "stats_column"):
            if (name := getattr(self, argument)) in have:
                raise ValueError(f"{argument} is {name!r}, which the dataset already has: {', '.join(have)}")


_STATS = pyarrow.struct(
    {
        "node": pyarrow.string(),
        "actor": pyarrow.string(),
        "process": pyarrow.int64(),
        "batch": pyarrow.int64(),
        "cache_bytes": pyarrow.int64(),
        "seconds": pyarrow.float64(),
        "prompt_tokens": pyarrow.int64(),
        "new_tokens": pyarrow.int64(),
    }
)
