"""The attention hook: the one line of transformers that is replaced is how an attention module looks its function up.

The function that comes back runs the original unless keys carry a mark of ours: a tag on plain tensors (the original
runs, then the layer may pack), or a `PackedHandle` (the kernel runs instead).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from . import compat, lookup, reasons
from .agreement import POSITIONS, Agreement, attend_as_agreed
from .autograd import differentiated
from .handle import KEYS, VALUES, PackedHandle
from .identity import Attention
from .layer import DEQUANTIZED, EVERY_STEP, NATIVE, MixKVQLayer
from .masks import reveals_padding
from .proof import SINKS, Proof, hides_padding, prove, sink_logits
from .reasons import Reason

if TYPE_CHECKING:
    from .cache import MixKVQCache

TAG = "_mixkvq"

_HARMLESS = POSITIONS.union(SINKS)  # tensor arguments; the proof covers sinks
_SERVED = _HARMLESS | {  # further arguments that the kernel knows, or that attention does not depend on
    "dropout",
    "is_causal",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "scaling",
    "sliding_window",
    "softcap",
    "use_cache",
}
_MASK_DTYPES = (torch.bool, torch.float32, torch.float16, torch.bfloat16)


class Tag:
    """Attribute of plain tensors that a cache handed out: whose they are, and whether they were decoded for it."""

    __slots__ = ("cache", "decoded", "epoch", "index")

    def __init__(self, cache: MixKVQCache, index: int, epoch: int, decoded: bool) -> None:
        self.cache, self.index, self.epoch, self.decoded = weakref.ref(cache), index, epoch, decoded

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a copied or unpickled tensor is nobody's


def _name(function: Attention) -> str:
    module = getattr(function, "__module__", "").rpartition(".")[2]
    return f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"


@dataclass(slots=True)
class Call:
    """One call of an attention function."""

    function: Attention
    module: Any
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    extra: tuple[Any, ...]
    arguments: dict[str, Any]
    output_dtype: torch.dtype
    known_as: Attention

    @classmethod
    def bind(cls, function: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Sort the arguments, however the model spelled them."""
        names = ("module", "query", "key", "value", "attention_mask")
        rest = dict(kwargs)
        module, query, key, value, mask = (*args[:5], *(rest.pop(name, None) for name in names[len(args) :]))
        return cls(function, module, query, key, value, mask, args[5:], rest, query.dtype, function)

    def original(self, key: torch.Tensor, value: torch.Tensor) -> Any:
        """What the model's own function gives with these keys and values."""
        return self.function(self.module, self.query, key, value, self.mask, *self.extra, **self.arguments)

    @property
    def name(self) -> str:
        """The function's name, for people and for comparison."""
        return _name(self.known_as)

    @property
    def given(self) -> frozenset[str]:
        """Arguments beside the first five that say something."""
        return frozenset(name for name, value in self.arguments.items() if value is not None and value is not False)

    @property
    def options(self) -> tuple[tuple[str, Any], ...]:
        """Given arguments that may mean anything, with their values."""
        simple, given = (bool, int, float, str), self.given
        return tuple(
            (name, value if isinstance(value, simple) else type(value).__name__)
            for name, value in sorted(self.arguments.items())
            if name in given and name not in _SERVED and not isinstance(value, torch.Tensor)
        )

    def refusal(self, layer: MixKVQLayer) -> Reason | None:
        """Why the kernel cannot compute what this call asks for, if it cannot."""
        if self.arguments.get("dropout"):
            return reasons.DROPOUT
        if self.extra:
            return reasons.positional(self.name, 5 + len(self.extra))
        for name, value in self.arguments.items():
            if isinstance(value, torch.Tensor) and name not in _HARMLESS:
                return reasons.unknown_tensor(self.name, name)
        return self._query_refusal(layer) or self._mask_refusal(layer)

    def _query_refusal(self, layer: MixKVQLayer) -> Reason | None:
        keys, query = layer.states[KEYS], self.query
        if (
            query.dim() != 4
            or (query.shape[0], query.shape[3]) != (keys.shape[0], keys.shape[3])
            or query.shape[1] % keys.shape[1]
        ):
            return reasons.misfit(list(query.shape), list(keys.shape))
        return None

    def _mask_refusal(self, layer: MixKVQLayer) -> Reason | None:
        mask, (batch, heads, n, _) = self.mask, self.query.shape
        if mask is None:
            return None
        if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.dtype not in _MASK_DTYPES:
            return reasons.strange_mask(self.name)
        fits = (
            mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, heads)
            and mask.shape[2] == n
            and mask.shape[3] >= layer.length
        )
        return None if fits else reasons.mask_shape(list(mask.shape), n, layer.length)

    def packed_refusal(self, layer: MixKVQLayer) -> Reason | None:
        """As `refusal`, for a packed layer: also if the proof does not cover this call or weights are wanted."""
        proof, n = layer.proof, self.query.shape[2]
        if differentiated(self.query):
            return reasons.GRADIENTS
        if self.arguments.get("output_attentions") or compat.attention_weights_wanted():
            return reasons.WEIGHTS
        if proof is None or not proof.identity.of(self.known_as):
            return reasons.other_function(self.name)
        if self.mask is None and n > 1:
            return reasons.no_mask(n)
        if self.mask is not None and not proof.masks:
            return reasons.unproved_mask(self.name)
        window = self.arguments.get("sliding_window")
        if window is not None and layer.length > window and proof.window != window:
            return reasons.window(window)
        changed = (self.given ^ proof.arguments) & {"softcap", *SINKS}
        changed |= {name for name, _ in set(self.options) ^ set(proof.options)}
        if changed:
            return reasons.changed(changed)
        return self.refusal(layer)


def _packed_call(call: Call) -> Any:
    """Keys are a handle: run the kernel, or decode and run the original."""
    key, value = call.key, call.value
    assert isinstance(key, PackedHandle)
    key.check()
    layer = key.layer
    paired = isinstance(value, PackedHandle) and value.layer is layer and (key.which, value.which) == (KEYS, VALUES)
    refused = call.packed_refusal(layer) if paired else reasons.TORN
    trouble: Reason | None = None
    if refused is None:
        result, trouble = _by_kernel(call, layer)
    else:
        plain = (
            layer.decode() if paired else (key.decode(), value.decode() if isinstance(value, PackedHandle) else value)
        )
        result = call.original(*plain)
        if refused == reasons.other_function(call.name):  # but from the next call on, if it computes the same
            verdict = call.refusal(layer) or _prove(replace(call, key=plain[KEYS], value=plain[VALUES]), result)
            if isinstance(verdict, Proof):
                layer.decide(verdict)
    if layer.store is not None and key.epoch == layer.epoch and call._query_refusal(layer) is None:
        layer.observe(call.query, call.mask)
        layer.pack()
    if refused:  # last: under -W error a warning is an exception
        layer.served_decoded(refused)
    elif trouble:
        layer.warn("", trouble)
    return result


def _by_kernel(call: Call, layer: MixKVQLayer) -> tuple[Any, Reason | None]:
    """What a call gets from the kernel, and what is wrong with it."""
    assert layer.store is not None and layer.proof is not None
    trouble = reasons.SHOWN_PADDING if reveals_padding(call.mask, layer.store.starts) else None
    output = layer.attend_in_full(
        call.query,
        call.mask,
        scaling=call.arguments.get("scaling"),
        softcap=call.arguments["softcap"] if layer.proof.softcap else None,
        sink_logits=sink_logits(call.module, call.arguments) if layer.proof.sinks else None,
    )
    layer.agreement = None if trouble else Agreement.about(call, layer)
    return (output, None), trouble


def _plain_call(tag: Tag, call: Call) -> Any:
    """Keys are plain tensors of a cache: run the original, look at the queries, pack what is due."""
    ours = getattr(call.value, TAG, None) is tag
    delattr(call.key, TAG)  # a function that somebody made from a hooked one: one hook is enough
    try:
        result = call.original(call.key, call.value)
    finally:
        setattr(call.key, TAG, tag)  # layers that share keys and values come later
    cache = tag.cache()
    if cache is None or not ours:
        return result
    layer = cache.layer_of_call(tag.index, call.module)
    if not isinstance(layer, MixKVQLayer) or layer.epoch != tag.epoch or layer.mode == NATIVE:
        return result
    if not layer.waiting:  # a module that reads what an earlier one has read
        return _from_records(call, layer, result, seen=False) if tag.decoded and layer.proof is not None else result
    layer.waiting = False
    if differentiated(call.query):
        layer.become_native(reasons.GRADIENTS)
        return result
    if call._query_refusal(layer) is None and (call.mask is None or call._mask_refusal(layer) is None):
        layer.observe(call.query, call.mask)
    loaded = layer.unproved
    if layer.undecided():
        layer.decide(call.refusal(layer) or _prove(call, result))
        if layer.mode == DEQUANTIZED and not hides_padding(call, result, layer.start):
            layer.keep_padding()
    if loaded and layer.proof is not None:
        return _from_records(call, layer, result, seen=True)
    fallen = layer.mode == DEQUANTIZED and (loaded or layer.store is None)
    layer.pack()
    if fallen:  # last: under -W error a warning is an exception
        layer.warn(EVERY_STEP, layer.reason)
    return result


def _from_records(call: Call, layer: MixKVQLayer, result: Any, *, seen: bool) -> Any:
    """What a call gets whose keys were decoded for a proof: what it would have got from the cache that was saved.

    Parameters
    ----------
    call : Call
    layer : MixKVQLayer
        Packed, and proved by now.
    result
        What the attention function gave with the decoded tensors.
    seen : bool
        Whether the layer has observed the call.
    """
    refused, trouble = call.packed_refusal(layer), None
    if refused is None:
        result, trouble = _by_kernel(call, layer)
    if not seen and call._query_refusal(layer) is None:
        layer.observe(call.query, call.mask)
    layer.pack()
    if refused:  # last: under -W error a warning is an exception
        layer.served_decoded(refused)
    elif trouble:
        layer.warn("", trouble)
    return result


def _prove(call: Call, result: Any) -> Proof | Reason | None:
    output = result[0] if isinstance(result, tuple) else result
    if not isinstance(output, torch.Tensor):
        return reasons.other_layout(call.name)
    call.output_dtype = output.dtype
    return prove(call, output)


def wrap(function: Attention, stands_for: Attention | None = None) -> Attention:
    """The function with the hook around it, made anew at every look-up: a table would keep alive what it closes over.

    What is proved with a function that ``stands_for`` another one is taken as proved of that one.
    """

    def attention(*args: Any, **kwargs: Any) -> Any:
        key = args[2] if len(args) > 2 else kwargs.get("key")
        if type(key) is PackedHandle:
            if len(args) == 5 and (output := attend_as_agreed(function, args, kwargs)) is not None:
                return output, None
            return _packed_call(Call.bind(function, args, kwargs))
        tag = getattr(key, TAG, None)
        if tag is None:
            return function(*args, **kwargs)
        call = Call.bind(function, args, kwargs)
        call.known_as = stands_for or function
        return _plain_call(tag, call)

    attention.__wrapped__ = function  # type: ignore[attr-defined]
    return attention


_HOOKED = wrap(_name).__code__


def unwrapped(function: Attention) -> Attention:
    """The function without the hook."""
    return function.__wrapped__ if getattr(function, "__code__", None) is _HOOKED else function  # type: ignore[attr-defined]


def install() -> None:
    """Put the hook in place; `MixKVQCache` does it. Once is enough, ``MIXKVQ_HOOK=off`` forbids it."""
    lookup.install(wrap, _HOOKED)


def uninstall() -> None:
    """Take the hook out. Caches in use go on with decoded keys and values."""
    lookup.uninstall()
