"""`MixKVQLM`: a model of lm-evaluation-harness whose every request goes through a scheme's cache.

Importing this module registers it as ``mixkvq``. From the command line, which does not know it by itself::

    python -m mixkvq.eval.lm run --model mixkvq --model_args pretrained=FOLDER,preset=default --tasks gsm8k

``preset`` is any scheme of `mixkvq.eval.schemes`; the other arguments are those of lm-eval's ``hf``.

* Generation: batches padded on the left, a fresh cache per batch, rows leave a batch as they finish. The prompt but its
  last token is read at once.
* Likelihoods: the context but its last token is read at once, the rest in chunks that end on block borders
  (`mixkvq.eval.forced`), so that every scored token is predicted from coded blocks, as in decoding. Rolling likelihoods
  have no context: all of their text is read in such chunks.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from ..fingerprint import identity
from .batches import continue_batch, read_batch
from .bits import bits_of
from .forced import forced_logits, scheme_ends
from .replay import Prefill
from .results import Results
from .schemes import Scheme, parse_scheme
from .scores import quiet_harness
from .stream import Emit

Ask = tuple[list[int], list[str], int, dict[str, Any]]
"""Token ids, stop strings, new tokens and options of ``generate`` of a request."""

PROTOCOL = (
    "prompts in left-padded batches, a fresh cache each; a prompt or context but its last token read at once, the rest "
    "through the filled cache, likelihoods in chunks that end on block borders"
)


def batches_of(asks: Sequence[Ask], todo: Sequence[int], size: int) -> Iterator[list[int]]:
    """Requests ``todo`` in batches of equal options, the longest first."""
    order = sorted(todo, key=lambda i: (json.dumps(asks[i][1:], sort_keys=True), -len(asks[i][0]), asks[i][0]))
    while order:
        same = [i for i in order[:size] if asks[i][1:] == asks[order[0]][1:]]
        yield same
        order = order[len(same) :]


@register_model("mixkvq")
class MixKVQLM(HFLM):  # type: ignore[misc]
    """A causal language model of transformers with a scheme's cache.

    Parameters
    ----------
    pretrained : str or model
    preset : str or Scheme
        See `mixkvq.eval.schemes`.
    results : Results, optional
        Where answers are looked up and kept; without it nothing is kept.
    emit : callable, optional
        Told of ("chunk", (done, total)) requests.
    device : str
        Of the model: the CPU, or a CUDA device with kernels; elsewhere nothing is packed.
    batch_size : int
        Prompts that are continued together; "auto" is not offered.
    **options
        Of lm-eval's ``HFLM``.

    Raises
    ------
    UserError
        For an unknown scheme.
    ValueError
        For a model that is no causal language model, or a batch_size that is no number.
    """

    def __init__(
        self,
        pretrained: Any,
        preset: str | Scheme = "default",
        *,
        results: Results | None = None,
        emit: Emit = lambda event, value: None,
        device: str = "cpu",
        batch_size: int | str = 1,
        **options: Any,
    ) -> None:
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}, must be at least 1")
        self.scheme = preset if isinstance(preset, Scheme) else parse_scheme(preset)
        self._results, self._emit = results, emit
        self.answered: list[dict[str, Any]] = []
        """What every request gave, with the bits of its cache."""
        super().__init__(pretrained, device=device, batch_size=int(batch_size), **options)
        if self.backend != "causal":
            raise ValueError(f"pretrained is {pretrained!r}, must be a causal language model")

    def _key(self, kind: str, what: Any) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        return {
            "measure": kind,
            **identity(self.model),
            "request": digest,
            "scheme": self.scheme.name,
            "details": self.scheme.details,
        }

    def _find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return None if self._results is None else self._results.find(key)

    def _keep(self, key: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        if self._results is not None:
            self._results.add(key, values)
        return values

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of (prompt, options) requests; those of equal options in batches, the longest first."""
        asks = [self._ask(*request.args) for request in requests]
        found = [self.known(ask) for ask in asks]
        done = sum(values is not None for values in found)
        for same in batches_of(asks, [i for i, values in enumerate(found) if values is None], self.batch_size):
            self._emit("chunk", (done, len(asks)))
            for i, values in zip(same, self.answer([asks[i] for i in same]), strict=True):
                found[i] = values
            done += len(same)
        self._emit("chunk", (done, len(asks)))
        answers = [values for values in found if values is not None]
        self.answered += answers
        for request, values in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, values["text"])
        return [values["text"] for values in answers]

    def known(self, ask: Ask) -> dict[str, Any] | None:
        """What a request gave before."""
        return self._find(self._key("answer", ask))

    def answer(self, asks: Sequence[Ask], prefill: Prefill | None = None) -> list[dict[str, Any]]:
        """Answer requests of equal options in one batch; ``prefill`` as in `continue_batch`."""
        values = self._continue(asks, prefill)
        return [
            self.known(ask) or self._keep(self._key("answer", ask), new) for ask, new in zip(asks, values, strict=True)
        ]

    def _ask(self, prompt: str, options: dict[str, Any]) -> Ask:
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        rest = normalize_gen_kwargs(options, self.max_gen_toks)
        stops, new = handle_stop_sequences(rest.pop("until", None), eos=eos), rest.pop("max_gen_toks")
        if rest.get("temperature") == 0:
            del rest["temperature"]
        room = self.max_length - new
        if room < 1:
            raise ValueError(f"max_gen_toks is {new}, must be below the model's {self.max_length} positions")
        return self.tok_encode(prompt)[-room:], [s for s in stops if s], new, rest

    def _continue(self, asks: Sequence[Ask], prefill: Prefill | None = None) -> list[dict[str, Any]]:
        _, stops, new_tokens, options = asks[0]
        cache, start = self.scheme.cache(self.model), time.perf_counter()
        prompts = [ask[0] for ask in asks]
        found = continue_batch(self.model, self.tokenizer, prompts, cache, new_tokens, stops, prefill, **options)
        seconds = (time.perf_counter() - start) / len(asks)
        bits = bits_of(cache)
        return [
            {
                "text": postprocess_generated_text(self.tok_decode(tokens), stops, None),
                "prompt_tokens": len(ask[0]),
                "new_tokens": len(tokens),
                "seconds": round(seconds, 3),
                **bits,
            }
            for ask, tokens in zip(asks, found, strict=True)
        ]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of (context, continuation) requests."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # `emit` is told instead
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts."""
        scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of a continuation, and whether it is the greedy one, of (names, context, continuation)."""
        found: list[dict[str, Any] | None] = [None] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}  # requests with the same first tokens share their first pass
        for i, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"continuation has {len(continuation)} tokens, must have at most the model's {self.max_length}"
                )
            ids = (*context, *continuation)[-(self.max_length + 1) :]
            groups.setdefault(tuple(ids[: len(ids) - len(continuation) - 1]), []).append(i)
        done = 0
        for head, members in groups.items():
            prefill = None
            for i in members:
                _, context, continuation = requests[i]
                ids = (*context, *continuation)[-(self.max_length + 1) :]
                key = self._key("likelihood", [ids, len(continuation)])
                found[i] = self._find(key)
                if found[i] is None:
                    prefill = prefill or self._read(head)
                    found[i] = self._keep(key, self._score(ids, len(continuation), prefill))
                done += 1
                self._emit("chunk", (done, len(requests)))
        answers = [values for values in found if values is not None]
        self.answered += answers
        scores = [(values["log_probability"], values["greedy"]) for values in answers]
        for (names, _, _), score in zip(requests, scores, strict=True):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, score)
        return scores

    def _read(self, head: tuple[int, ...]) -> Prefill:
        if not head:
            return Prefill(0, [], torch.empty(0))
        return Prefill.record(self.model, torch.tensor([head], device=self.device))

    def _score(self, ids: tuple[int, ...], scored: int, prefill: Prefill) -> dict[str, Any]:
        cache, tokens = self.scheme.cache(self.model), torch.tensor([ids], device=self.device)
        begin, total, greedy, inputs = prefill.tokens, 0.0, True, tokens[:, :-1]
        for logits in forced_logits(
            self.model, inputs, prefill, cache, scheme_ends(self.scheme, begin, inputs.shape[1])
        ):
            first = max(begin, len(ids) - 1 - scored)  # the position that predicts the first scored token, or later
            rows, want = logits[first - begin :].float(), tokens[0, first + 1 : begin + 1 + len(logits)]
            total += float(torch.log_softmax(rows, -1).gather(1, want[:, None]).double().sum())
            greedy &= bool((rows.argmax(-1) == want).all())
            begin += len(logits)
        return {"log_probability": total, "greedy": greedy, "tokens": inputs.shape[1], **bits_of(cache)}


class _Listener(MixKVQLM):
    """Listens to what a task asks and answers nothing."""

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        self.asks = [self._ask(*request.args) for request in requests]
        return [""] * len(requests)


def answer_together(
    model: Any,
    tokenizer: Any,
    schemes: Sequence[Scheme],
    ask: Callable[[MixKVQLM], Any],
    results: Results,
    emit: Emit,
    batch_size: int,
) -> None:
    """Answer the generation requests of a task with several schemes; every batch of prompts is read once for all.

    Parameters
    ----------
    model, tokenizer : a causal language model of transformers and its tokenizer
    schemes : sequence of Scheme
    ask : callable
        Runs the task with the model it is given.
    results : Results
        Keeps the answers; a later run of the task finds them there.
    emit : callable
        Told of ("chunk", (done, total)) answers.
    batch_size : int
    """
    quiet_harness()
    listener = _Listener(model, schemes[0], tokenizer=tokenizer, batch_size=batch_size)
    ask(listener)
    asks: list[Ask] = getattr(listener, "asks", [])
    answering = [
        MixKVQLM(model, scheme, results=results, tokenizer=tokenizer, batch_size=batch_size) for scheme in schemes
    ]
    total = len(asks) * len(schemes)
    done = sum(lm.known(a) is not None for a in asks for lm in answering)
    todo = [i for i, a in enumerate(asks) if any(lm.known(a) is None for lm in answering)]
    for same in batches_of(asks, todo, batch_size):
        batch = [asks[i] for i in same]
        prefill = read_batch(model, tokenizer, [a[0] for a in batch])
        for lm in answering:
            missing = sum(lm.known(a) is None for a in batch)
            if missing:
                lm.answer(batch, prefill)
                done += missing
            emit("chunk", (done, total))


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
