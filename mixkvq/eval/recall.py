"""``mixkvq eval recall``: facts hidden in long documents, asked for through every scheme's cache.

The text of a document is read once, at once, and replayed into every cache; questions and answers follow,
teacher-forced, in chunks that end on block borders. So an answer finds its fact in coded blocks, wherever it stands but
in the newest tokens. An answer is right if each of its tokens is the most likely one: what greedy decoding would write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..fingerprint import identity
from .bits import bits_of, bits_over
from .documents import Document
from .forced import forced_logits, scheme_ends
from .replay import Prefill
from .results import Results, rounded
from .schemes import Scheme
from .stats import Interval, difference_interval, mean_interval
from .stream import Emit

Doubles = NDArray[np.float64]
PROTOCOL = "text read at once; questions and answers teacher-forced in chunks that end on block borders"


def key_of(model: Any, document: Document, scheme: Scheme) -> dict[str, Any]:
    """What a measurement is found by."""
    return {
        "measure": "recall",
        **identity(model),
        "task": document.task,
        "length": document.length,
        "document": document.index,
        "text": document.digest,
        "protocol": PROTOCOL,
        "scheme": scheme.name,
        "details": scheme.details,
    }


def measure(model: Any, documents: Sequence[Document], schemes: Sequence[Scheme], results: Results, emit: Emit) -> None:
    """Measure what ``results`` does not hold yet; `emit` is told of ("chunk", (done, total)) each time."""
    total, done = len(documents) * len(schemes), 0
    for document in documents:
        todo = [s for s in schemes if results.find(key_of(model, document, s)) is None]
        done += len(schemes) - len(todo)
        emit("chunk", (done, total))
        if not todo:
            continue
        ids = torch.tensor([document.ids])
        prefill = Prefill.record(model, ids[:, : document.text])
        for scheme in todo:
            results.add(key_of(model, document, scheme), answer(model, document, prefill, scheme))
            done += 1
            emit("chunk", (done, total))


def answer(model: Any, document: Document, prefill: Prefill, scheme: Scheme) -> dict[str, Any]:
    """Answer the questions about a document.

    Parameters
    ----------
    model : causal language model
    document : Document
    prefill : Prefill
        Of its text.
    scheme : Scheme

    Returns
    -------
    dict
        "right", a list of 0 and 1 per answer; "log_probability", in nats, a list of those of the whole answers; bits.
    """
    ids, cache = torch.tensor([document.ids]), scheme.cache(model)
    ends = scheme_ends(scheme, prefill.tokens, ids.shape[1])
    begin, right, log_p = prefill.tokens, [True] * len(document.answers), [0.0] * len(document.answers)
    for logits in forced_logits(model, ids, prefill, cache, ends):
        log_probabilities = torch.log_softmax(logits.float(), -1)
        for i, (first, behind) in enumerate(document.answers):
            for token in range(max(first, begin + 1), min(behind, begin + 1 + len(logits))):
                row = log_probabilities[token - 1 - begin]
                right[i] &= bool(row.argmax() == ids[0, token])
                log_p[i] += float(row[ids[0, token]])
        begin += len(logits)
    return {
        "right": [int(x) for x in right],
        "log_probability": rounded(log_p),
        "tokens": ids.shape[1],
        **bits_of(cache),
    }


@dataclass(frozen=True)
class Summary:
    """One scheme on the documents of one task and length."""

    scheme: Scheme
    task: str
    length: int
    true_bits: float | None
    effective_bits: float | None
    right: Interval
    """Share of right answers."""
    right_change: Interval
    """Less that of the exact cache, paired."""
    log_probability: Interval
    """Mean log-probability of the right answer, nats."""
    log_change: Interval
    documents: int
    answers: int


def summarize(
    model: Any, documents: Sequence[Document], schemes: Sequence[Scheme], results: Results, exact: Scheme
) -> list[Summary]:
    """What ``results`` holds, one row per length, task and scheme; documents are the units of the intervals."""

    def rows(part: Sequence[Document], scheme: Scheme) -> list[dict[str, Any]]:
        return results.rows((key_of(model, document, scheme) for document in part), f"scheme {scheme.name}")

    def units(found: list[dict[str, Any]], name: str) -> Doubles:
        return np.array([np.mean(row[name]) for row in found])

    summaries = []
    for length, task in dict.fromkeys((d.length, d.task) for d in documents):
        part = [d for d in documents if (d.length, d.task) == (length, task)]
        base = rows(part, exact)
        for scheme in schemes:
            found = rows(part, scheme)
            true_bits, effective_bits = bits_over(found)
            right, log_p = units(found, "right"), units(found, "log_probability")
            summaries.append(
                Summary(
                    scheme=scheme,
                    task=task,
                    length=length,
                    true_bits=true_bits,
                    effective_bits=effective_bits,
                    right=mean_interval(right),
                    right_change=difference_interval(right, units(base, "right")),
                    log_probability=mean_interval(log_p),
                    log_change=difference_interval(log_p, units(base, "log_probability")),
                    documents=len(part),
                    answers=sum(len(d.answers) for d in part),
                )
            )
    return summaries
