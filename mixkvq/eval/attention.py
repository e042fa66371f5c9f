"""`LayerStates`: queries, keys and values of one layer over a text, and what a cache does to the attention over them.

The first tokens go into the cache as a prompt would, through the attention hook; the queries behind them then attend to
what the cache gives back. No model is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..handle import PackedHandle
from ..masks import allowed
from ..proof import sink_logits
from .forced import kl_of_logs
from .memory import CodedLayer, coded_layers
from .replay import AttentionCall

Doubles = NDArray[np.float64]
CHUNK = 64
"""Queries of a cell: errors are kept per head and stretch of so many queries."""


@dataclass(frozen=True)
class LayerStates:
    """One layer's attention over a text of ``n`` tokens, float32.

    Attributes
    ----------
    layer : int
    query : tensor [Q, n, D]
        After RoPE.
    key, value : tensor [H, n, D]
    scaling : float
    softcap : float or None
    window : int or None
        A query sees itself and the ``window - 1`` tokens before it; None: all before it.
    sinks : tensor [Q] or None
        Learned logits in the softmax denominator.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scaling: float
    softcap: float | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None

    @classmethod
    def of_call(cls, call: AttentionCall) -> LayerStates:
        """From a recorded call with one batch row.

        Raises
        ------
        ValueError
            If the call is no softmax attention over the tokens before each query.
        """
        rest = dict(call.arguments)
        mask = call.rest[0] if call.rest else rest.get("attention_mask")
        scaling = rest.get("scaling")
        query, key, value = (t[0].float() for t in (call.query, call.key, call.value))
        sinks = sink_logits(call.module, rest)
        states = cls(
            call.layer,
            query,
            key,
            value,
            scaling=call.query.shape[-1] ** -0.5 if scaling is None else float(scaling),
            softcap=rest.get("softcap"),
            window=rest.get("sliding_window"),
            sinks=None if sinks is None else sinks.detach(),
        )
        n = call.query.shape[2]
        if key.shape != value.shape:
            raise ValueError(f"layer {call.layer} has keys {list(key.shape)} and values {list(value.shape)}")
        if mask is not None and not torch.equal(allowed(mask[0, 0, :, :n]), states.visible(0)):
            raise ValueError(f"layer {call.layer} is masked in a way that is neither causal nor a sliding window")
        result = call.result[0] if isinstance(call.result, tuple) else call.result
        want, got = result[0, -1].float(), states.attend(states.logits(states.key, n - 1), states.value, n - 1)[:, 0]
        tolerance = 4 * torch.finfo(call.query.dtype).eps + 1e-4
        if want.shape != got.shape or bool((want - got).abs().max() > tolerance * want.abs().max()):
            raise ValueError(f"layer {call.layer} computes something else than softmax attention")
        return states

    @property
    def tokens(self) -> int:
        """n."""
        return self.query.shape[1]

    def visible(self, first: int, column: int = 0) -> torch.Tensor:
        """bool [n - first, n - column]: which keys from ``column`` on the queries from ``first`` on see."""
        at, keys = torch.arange(first, self.tokens)[:, None], torch.arange(column, self.tokens)
        seen = keys <= at
        return seen if self.window is None else seen & (keys > at - self.window)

    def logits(self, key: torch.Tensor, first: int) -> torch.Tensor:
        """Scores [Q, n - first, keys] of the queries from ``first`` on, before any mask."""
        q = self.query[:, first:].reshape(key.shape[0], -1, key.shape[2])
        scores = (q @ key.transpose(1, 2)).view(self.query.shape[0], -1, key.shape[1]) * self.scaling
        return scores if not self.softcap else torch.tanh(scores / self.softcap) * self.softcap

    def weights(self, logits: torch.Tensor, first: int) -> torch.Tensor:
        """ln of the attention weights, -inf where hidden; ``logits`` [Q, n - first, keys] end with the last token.

        Returns
        -------
        tensor [Q, n - first, keys], with learned sinks one column more: what they take
        """
        scores = logits.masked_fill(~self.visible(first, self.tokens - logits.shape[2]), -torch.inf)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.view(-1, 1, 1).expand(-1, scores.shape[1], -1)], 2)
        return scores.log_softmax(-1)

    def attend(self, logits: torch.Tensor, value: torch.Tensor, first: int) -> torch.Tensor:
        """Output [Q, n - first, D]."""
        return self.mix(self.weights(logits, first), value)

    def mix(self, log_weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Output [Q, m, D] of weights [Q, m, keys or one more] over values [H, keys, D]."""
        weights = log_weights[..., : value.shape[1]].exp().reshape(value.shape[0], -1, value.shape[1])
        return torch.matmul(weights, value).view(*log_weights.shape[:2], -1)


@dataclass(frozen=True)
class Seen:
    """What a cache gives back of one layer."""

    key: torch.Tensor
    """[H, m, D], the last m tokens of the text"""
    value: torch.Tensor
    coded: CodedLayer
    """What was coded of the prompt."""
    cache: Any
    """With the prompt alone it held ``coded``; it has seen all tokens now."""


def through_cache(states: LayerStates, cache: Any, prompt: int) -> Seen:
    """Put the first ``prompt`` tokens into an empty cache, then all others, and read what attention would see.

    Parameters
    ----------
    states : LayerStates
    cache : transformers Cache
    prompt : int
        From 1 to n - 1.
    """
    arguments: dict[str, Any] = {"scaling": states.scaling}
    if states.softcap is not None:
        arguments["softcap"] = states.softcap
    if states.window is not None:
        arguments["sliding_window"] = states.window
    if states.sinks is not None:
        arguments["s_aux"] = states.sinks
    with torch.inference_mode():
        query, key, value = (t[:, :prompt].clone() for t in (states.query, states.key, states.value))
        first = replace(states, query=query, key=key, value=value)
        last = first.attend(first.logits(first.key, prompt - 1), first.value, prompt - 1)
        call = AttentionCall(
            states.layer,
            softmax_attention,
            SimpleNamespace(),
            query[None],
            key[None],
            value[None],
            rest=(None,),
            arguments=arguments,
            result=(last.transpose(0, 1)[None], None),
        )
        call.replay(cache)
        coded = coded_layers(cache)[states.layer]
        found = cache.update(states.key[None, :, prompt:], states.value[None, :, prompt:], states.layer)
        key, value = (t.decode() if type(t) is PackedHandle else t for t in found)
    return Seen(key[0], value[0], coded, cache)


def softmax_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a recorded call, for rows that were not recorded; without a mask they see all keys."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], 3)
    return (scores.softmax(-1)[..., : key.shape[2]] @ value).transpose(1, 2), None


@dataclass(frozen=True)
class Errors:
    """What a cache does to one layer's attention; squares are relative, ||difference||² / ||exact||²."""

    logits: Doubles
    """[Q, chunks] of the scores over the prompt's tokens behind the sinks."""
    output: Doubles
    """[Q, chunks] of the attention output."""
    kl: Doubles
    """[Q, chunks] mean KL(exact || cache) of the attention weights, nats."""
    key: Doubles
    """[H] over the prompt's tokens behind the sinks."""
    value: Doubles
    """[H]"""


class ExactAttention:
    """The exact logits, weights and outputs of the queries behind a prompt, computed once for many caches.

    Parameters
    ----------
    states : LayerStates
    prompt : int
        Tokens before the queries.
    sink_length : int
        First tokens of the prompt that errors of logits, keys and values leave out.
    """

    def __init__(self, states: LayerStates, prompt: int, sink_length: int) -> None:
        self.states, self.prompt, self.sink_length = states, prompt, sink_length
        self._logits = states.logits(states.key, prompt)
        self._weights = states.weights(self._logits, prompt)
        self._output = states.mix(self._weights, states.value)

    def errors(self, seen: Seen) -> Errors:
        """Compare with what a cache gives back."""
        states, prompt = self.states, self.prompt
        missing = states.tokens - seen.key.shape[1]  # tokens that a sliding layer has let go
        begin = max(self.sink_length, missing)
        logits = states.logits(seen.key, prompt)
        weights = states.weights(logits, prompt)
        kl = kl_of_logs(self._weights[..., missing:], weights)
        part = slice(begin, prompt)
        return Errors(
            logits=_chunks(self._logits[..., part], logits[..., begin - missing : prompt - missing]),
            output=_chunks(self._output, states.mix(weights, seen.value)),
            kl=np.stack([x.mean(1).numpy() for x in torch.split(kl, CHUNK, 1)], 1),
            key=_relative(states.key[:, part], seen.key[:, begin - missing : prompt - missing]),
            value=_relative(states.value[:, part], seen.value[:, begin - missing : prompt - missing]),
        )


def _relative(exact: torch.Tensor, other: torch.Tensor) -> Doubles:
    """||other - exact||² / ||exact||² per entry of the first axis; 0 where both are 0."""
    wrong, size = ((t.double() ** 2).flatten(1).sum(1) for t in (other - exact, exact))
    return np.asarray((wrong / size.clamp(min=torch.finfo(torch.float64).tiny)).numpy())


def _chunks(exact: torch.Tensor, other: torch.Tensor) -> Doubles:
    pairs = zip(torch.split(exact, CHUNK, 1), torch.split(other, CHUNK, 1), strict=True)
    return np.stack([_relative(a, b) for a, b in pairs], 1)
