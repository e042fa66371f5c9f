"""Tasks of lm-evaluation-harness with every scheme: their scores, and the paired change to the exact cache."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..fingerprint import identity
from .bits import bits_over
from .results import Results
from .schemes import Scheme
from .stats import Interval, difference_interval, mean_interval
from .stream import Emit

Doubles = NDArray[np.float64]
SEED = 1234
"""As lm-eval has it: of the worked examples that a task draws."""


@dataclass(frozen=True)
class Score:
    """One scheme, task, metric and filter."""

    scheme: Scheme
    metric: str
    """``task metric,filter``, as lm-eval calls it."""
    value: float
    """As lm-eval computes it."""
    units: Doubles | None
    """One number per sample, whose mean is `value`; None for a metric that is no such mean."""
    true_bits: float | None
    effective_bits: float | None
    change: Interval | None = None
    """Less the exact cache's, paired; None without `units`."""

    @property
    def interval(self) -> Interval | None:
        """Of the value."""
        return None if self.units is None else mean_interval(self.units)


def quiet_harness() -> None:
    """No advice from lm-eval on its command line and its habits."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def run_harness(
    lm: Any,
    tasks: Sequence[Any],
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_manager: Any = None,
    chat: bool = False,
) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` does without looking at the machine, which takes it 10 seconds.

    Parameters
    ----------
    lm : lm_eval LM
    tasks : sequence of str or lm_eval Task
    num_fewshot : int, optional
        Worked examples, unless a task has none by principle. Default: the task's.
    limit : int, optional
        Documents of each task.
    task_manager : lm_eval TaskManager, optional
    chat : bool
        Put prompts into the model's chat template.

    Returns
    -------
    dict
        With "results" and "samples" by task.

    Raises
    ------
    UserError
        When lm-eval does not know a task or cannot load its data.
    """
    quiet_harness()
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from transformers import set_seed

    set_seed(SEED)
    names = [task for task in tasks if isinstance(task, str)]
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    if names:
        try:
            loaded = (task_manager or TaskManager()).load(names)
        except (KeyError, ValueError, OSError) as error:
            first = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(f"lm-eval cannot load {', '.join(names)}: {first}") from error
    loaded["tasks"].update({task.config.task: task for task in tasks if not isinstance(task, str)})
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own != 0:
            task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(seed=SEED)
    found: dict[str, Any] = evaluator.evaluate(
        lm, loaded, limit=limit, bootstrap_iters=0, apply_chat_template=chat, fewshot_as_multiturn=chat
    )
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    scheme: Scheme,
    tasks: Sequence[Any],
    results: Results,
    emit: Emit,
    batch_size: int = 8,
    **options: Any,
) -> list[Score]:
    """Run tasks with one scheme; requests that ``results`` holds already are not made again.

    Parameters
    ----------
    model, tokenizer : a causal language model of transformers and its tokenizer
    scheme : Scheme
    tasks : sequence of str or lm_eval Task
    results : Results
    emit : callable
    batch_size : int
    **options
        Of `run_harness`.

    Raises
    ------
    UserError
        When lm-eval does not know a task or cannot load its data.
    """
    from .lm import PROTOCOL, MixKVQLM

    quiet_harness()
    lm = MixKVQLM(model, scheme, results=results, emit=emit, tokenizer=tokenizer, batch_size=batch_size)
    emit("say", f"Requests with {scheme.label}")
    found = run_harness(lm, tasks, **options)
    true_bits, effective_bits = bits_over(lm.answered)
    scores = []
    for task, values in found["results"].items():
        samples = found["samples"].get(task, [])  # none for a group of tasks
        asked = [(sample["prompt_hash"], sample["target_hash"]) for sample in samples]
        digest = hashlib.sha256(repr(asked).encode()).hexdigest()[:12]
        for metric, value in values.items():
            name, comma, filtered = metric.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            units = _units(samples, name, filtered, float(value))
            scores.append(Score(scheme, f"{task} {metric}", float(value), units, true_bits, effective_bits))
            key = {
                "measure": "lm-eval",
                **identity(model),
                "task": task,
                "metric": metric,
                "samples": len({sample["doc_id"] for sample in samples}),
                "requests": digest,
                "options": {k: v for k, v in options.items() if isinstance(v, (int, float, str))},
                "protocol": PROTOCOL,
                "scheme": scheme.name,
                "details": scheme.details,
            }
            values_of = {"value": value, "true_bits": true_bits, "effective_bits": effective_bits}
            if results.find(key) != values_of:  # the last one counts
                results.add(key, values_of)
    return scores


def _units(samples: Sequence[Mapping[str, Any]], metric: str, filtered: str, value: float) -> Doubles | None:
    """The metric of every sample in the order of the documents, if the value is their mean."""
    rows = sorted((s for s in samples if s["filter"] == filtered), key=lambda s: s["doc_id"])
    numbers = [row.get(metric) for row in rows]
    if not numbers or not all(isinstance(x, (bool, int, float, np.number)) for x in numbers):
        return None
    units = np.array(numbers, np.float64)
    return units if np.isclose(units.mean(), value) else None


def compare(schemes: Sequence[Scheme], exact: Scheme, run: Callable[[Scheme], list[Score]]) -> list[Score]:
    """Scores of all schemes, metric by metric, with their change to those of the exact cache."""
    scores = {scheme.name: run(scheme) for scheme in dict.fromkeys([exact, *schemes])}
    rows = []
    for place, base in enumerate(scores[exact.name]):
        for scheme in schemes:
            row = scores[scheme.name][place]
            change = None
            if row.units is not None and base.units is not None:
                change = difference_interval(row.units, base.units)
            rows.append(Score(scheme, row.metric, row.value, row.units, row.true_bits, row.effective_bits, change))
    return rows
