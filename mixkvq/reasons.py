"""Why a layer takes its path, and what a user could do about it: every text that `MixKVQCache.report` can give.

No other file makes a `Reason`, so that none can exist without a remedy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_FINE = "nothing to do"
_FALLS = "memory falls all the same"
_OTHERS = 'attn_implementation="sdpa", or "eager" from transformers 5.1 on'


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason.

    Attributes
    ----------
    what : str
        What happened.
    remedy : str
        What a user could do.
    """

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} -> {self.remedy}"

    @classmethod
    def saved(cls, what: str, remedy: str) -> Reason:
        """As a file has it."""
        return cls(what, remedy)


# ---- nothing is wrong ----------------------------------------------------------------------------------------------
EMPTY = Reason("nothing cached yet", f"{_FINE}: pass the cache to a model")
EMPTIED = Reason("emptied by crop", f"{_FINE}: what comes next is packed again")
SIMULATED = Reason("coded and decoded at once, for comparison", f"{_FINE}; for real records use MixKVQCache")


def waiting(tokens: int) -> Reason:
    """Too short to pack."""
    return Reason(
        f"nothing packed yet: begins at {tokens} tokens",
        f"{_FINE}; a smaller residual_length packs shorter texts",
    )


def packed(function: str) -> Reason:
    """Packed, and read by the kernel."""
    return Reason(f"{function} proved to be what the kernel computes", _FINE)


LOADED = Reason("packed records from a file", f"{_FINE}: the next attention call proves how it reads them")


def transformers_layer(name: str, *, window: int | None = None, linear: bool = False, empty: bool = False) -> Reason:
    """A layer that transformers made and keeps."""
    if window is not None:
        return Reason(f"transformers' {name}: at most {window} tokens are kept", _FINE)
    if linear:
        return Reason(f"transformers' {name}: a state that does not grow", _FINE)
    if empty:
        return Reason(f"transformers' {name}: holds nothing, an earlier layer's keys and values are read", _FINE)
    return Reason(f"transformers' {name}", f"{_FINE}: the model needs a layer of its own kind here")


# ---- not packed yet ------------------------------------------------------------------------------------------------
NO_REAL_TOKEN = Reason(
    "nothing packed yet: a batch row has no real token",
    "leave rows that are padding only out of the batch; or nothing: packing begins when every row has tokens",
)
UNPROVED = Reason(
    "nothing packed yet: the last query sees fewer than 4 keys or gets no finite output, which proves nothing",
    f"{_FINE} if a later token is packed; else look for a mask that hides everything, or for NaN in the model's output",
)
ASSIGNED = Reason(
    "tensors were assigned from outside",
    "the next attention call packs them again; crop, reorder_cache and batch_select_indices keep records as they are",
)
FILLED = Reason(
    "filled by update: no attention was seen yet",
    f"{_FINE}: the next attention call tells how it is read",
)

# ---- native: full precision ----------------------------------------------------------------------------------------
GRADIENTS = Reason(
    "gradients are required",
    "call the model under torch.no_grad() or torch.inference_mode(), from the prompt on and with a new cache",
)


def latent(keys: list[int], values: list[int]) -> Reason:
    """Keys and values that are no pair."""
    return Reason(
        f"keys {keys} and values {values} differ in shape, as latent (MLA) attention does",
        f"{_FINE}: this attention keeps little per token already, and records cannot hold it",
    )


def device(name: object) -> Reason:
    """No kernels there, whatever one does."""
    return Reason(f"no packed kernels for {name}", "run the model on the CPU or on a CUDA device")


def cuda(name: object, why: object, remedy: object) -> Reason:
    """No kernels on a CUDA device."""
    return Reason(f"no packed kernels for {name}: {why}", f"run the model on the CPU, or {remedy}")


def dtype(name: object) -> Reason:
    """No records of such numbers."""
    return Reason(f"no packed kernels for {name}", "load the model in float32, bfloat16 or float16")


def different_dtypes(keys: object, values: object) -> Reason:
    """No pair, unless under autocast."""
    return Reason(f"keys are {keys} and values {values} outside autocast", "pass keys and values of one dtype")


def wider(keys: object, values: object, records: object) -> Reason:
    """Packed tokens are followed by more exact ones."""
    return Reason(
        f"keys in {keys} and values in {values} follow on records of {records}",
        "call the model with the same autocast for the prompt and for every later token",
    )


def codec(message: str) -> Reason:
    """A shape that records cannot hold under the cache's configuration; the message says which they can."""
    return Reason(f"no packed kernels: {message}", "the model works all the same; only such layers can be packed")


# ---- dequantized: records, but decoded for every step --------------------------------------------------------------
INVISIBLE = Reason(
    "attention does not pass through transformers' AttentionInterface with the cached tensors, nor does its mask: "
    "padding is stored as tokens are",
    f'{_FALLS}; for fused reads try a newer transformers or model code, or attn_implementation="sdpa" if it is another',
)
HOOK_FORBIDDEN = Reason(
    "the attention hook is off (MIXKVQ_HOOK=off)",
    "unset MIXKVQ_HOOK and make a new cache",
)
HOOK_OUT = Reason(
    "the attention hook was taken out",
    "call mixkvq.install() and make a new cache",
)
HOOK_REPLACED = Reason(
    "another library replaced transformers' look-up of attention functions and the attention hook with it",
    "call mixkvq.install() after that library and make a new cache",
)
COMPILED = Reason(
    "the model is compiled",
    "run the model without torch.compile, or compile only its feed-forward modules, and make a new cache",
)


def mismatch(function: str, how: str) -> Reason:
    """The proof failed."""
    return Reason(
        f"{function} does not compute what the kernel does ({how})",
        f"{_FALLS}; for fused reads try another implementation: {_OTHERS}",
    )


def other_layout(function: str) -> Reason:
    """The proof cannot be made."""
    return Reason(
        f"{function} returns another layout than [batch, tokens, heads, head_dim]",
        f"{_FALLS}; for fused reads try another implementation: {_OTHERS}",
    )


# ---- one call, or every one, that the kernel cannot serve ----------------------------------------------------------
DROPOUT = Reason("attention dropout", "call model.eval(), and then the model with a new cache")
WEIGHTS = Reason("attention weights are wanted", "do not ask for output_attentions: no fused kernel returns weights")
TORN = Reason(
    "keys and values do not come from one layer",
    f"{_FALLS}; pass keys and values to attention as the cache's update returned them",
)


def positional(function: str, count: int) -> Reason:
    """More positional arguments than anybody can name."""
    return Reason(
        f"{function} is called with {count} positional arguments",
        "in the model's code, pass all after attention_mask by name",
    )


def unknown_tensor(function: str, name: str) -> Reason:
    """A tensor that may mean anything."""
    return Reason(
        f"{function} is called with a tensor {name!r} that the kernel does not know",
        f"{_FALLS}; a bias that is part of attention_mask can be read fused",
    )


def misfit(queries: list[int], keys: list[int]) -> Reason:
    """Queries of another model or batch."""
    return Reason(
        f"queries {queries} do not fit to keys {keys}",
        "query heads must be a multiple of key heads, batch and head_dim the same",
    )


def strange_mask(function: str) -> Reason:
    """A mask of another kind."""
    return Reason(
        f"{function} is called with a mask that is no 4-dimensional bool or float tensor",
        f"use an implementation that makes such masks: {_OTHERS}",
    )


def mask_shape(mask: list[int], queries: int, keys: int) -> Reason:
    """A mask that covers something else."""
    return Reason(
        f"a mask of shape {mask} for {queries} queries and {keys} keys",
        "pass attention_mask for all tokens, cached and new ones",
    )


def other_function(function: str) -> Reason:
    """Another attention function than at the proof."""
    return Reason(
        f"{function} was not proved to be what the kernel computes",
        "keep attn_implementation as it was when the cache was filled; or nothing: what computes the same is read "
        "packed from its second call on",
    )


def no_mask(queries: int) -> Reason:
    """Which of several queries sees what?"""
    return Reason(f"{queries} queries without a mask", "pass attention_mask, or one token at a time")


def unproved_mask(function: str) -> Reason:
    """Masks were not part of the proof."""
    return Reason(
        f"{function} was not proved to hide what a mask hides",
        f"use an implementation that does: {_OTHERS}; or leave padding and masks out",
    )


def window(size: object) -> Reason:
    """A sliding window that the proof did not reach."""
    return Reason(
        f"sliding_window={size} begins to hide tokens, which was not proved",
        "pass MixKVQCache(config=model.config), so that sliding layers are laid out; or nothing, if that is done",
    )


def changed(names: Iterable[str]) -> Reason:
    """Arguments that the proof saw otherwise."""
    return Reason(
        f"{', '.join(sorted(names))} given in one call and not in another, or with another value",
        "call the model with the same options for the prompt and for every later token",
    )


READ = Reason(
    "keys or values were read from the layer",
    f"{_FINE}, if your code did it once; cross attention does it in every step: give it a cache of its own, as in "
    "EncoderDecoderCache(MixKVQCache(), DynamicCache())",
)


# ---- the handles that a packed layer gives out ---------------------------------------------------------------------
def operator(name: object) -> Reason:
    """Somebody computes with handles."""
    return Reason(
        f"{name} computes with the cached keys or values outside transformers' AttentionInterface",
        f"{_FALLS}; if this is your code, read cache.layers[i].keys once instead",
    )


SHOWN_PADDING = Reason(
    "attention_mask shows columns that were hidden as padding when the cache was filled; they are not stored and stay "
    "hidden",
    "pass the same padding in every call",
)
