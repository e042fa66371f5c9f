"""What every change of a layer goes through: one thread at a time, and all or nothing.

`MixKVQLayer` marks itself as in use (``busy``) while it changes or while the kernel reads it. A change that fails, for
lack of memory or by Ctrl-C, is taken back. One that overwrites what could be needed for that, the window when a block
leaves it, marks the store as torn until it is done: a store that is found torn says that the cache must be emptied.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch

if TYPE_CHECKING:
    from .layer import MixKVQLayer

F = TypeVar("F", bound=Callable[..., Any])
State = list[tuple[Any, dict[str, Any]]]


class Begun(NamedTuple):
    """What is noted of a layer when a forward pass begins: see `passes`."""

    length: int
    alike: tuple[int, int] | None
    """The same for layers that must be of one length; None for one without tokens."""


NOT_YET = Begun(0, None)

BROKEN = -1
"""`busy` of a layer whose store is torn."""
ANOTHER_THREAD = (
    "is in use by another thread: one forward pass at a time; give each thread a cache of its own, such as those of "
    "cache.fork(n)"
)
TORN = "was left half changed by an error or an interrupt: cache.reset() empties the cache"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory: torch's allocator for the CPU raises RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "allocate memory" in str(error)
    )


# ---- one at a time -------------------------------------------------------------------------------------------------
def refusal(layer: MixKVQLayer) -> RuntimeError:
    """The error for a layer that is torn or in use."""
    which = "" if layer.index is None else f" {layer.index}"
    return RuntimeError(f"layer{which} of a MixKVQCache {TORN if layer.busy == BROKEN else ANOTHER_THREAD}")


def exclusive(method: F) -> F:
    """A method of a layer that no other thread may interfere with.

    Raises
    ------
    RuntimeError
        If another thread uses the layer, or it is torn; nothing has changed then.
    """

    @functools.wraps(method)
    def alone(self: MixKVQLayer, *args: Any, **kwargs: Any) -> Any:
        me = get_ident()
        if self.busy == me:  # a part of another one
            return method(self, *args, **kwargs)
        if self.busy:
            raise refusal(self)
        self.busy = me
        try:
            return method(self, *args, **kwargs)
        finally:
            # not by a function: before its first instruction Ctrl-C could come
            self.busy = BROKEN if self.store is not None and self.store.torn else 0

    return cast("F", alone)


# ---- all or nothing ------------------------------------------------------------------------------------------------
def undoing(method: F) -> F:
    """A method of a layer that puts new tensors in the place of old ones: after an error the old ones are back."""

    @functools.wraps(method)
    def whole(self: MixKVQLayer, *args: Any, **kwargs: Any) -> Any:
        before = state_of(self)
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            restore(before)
            raise

    return cast("F", whole)


def state_of(layer: Any) -> State:
    """All that a layer, ours or transformers', refers to; its tensors are not copied. Who is torn stays so."""
    parts = [layer]
    store, queries = getattr(layer, "store", None), vars(layer).get("queries")
    parts += [queries] if store is None else [store, store.records, store.queries]
    return [(part, _own_all(vars(part))) for part in parts if part is not None]


def _own_all(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _own(value) for name, value in values.items() if name not in ("torn", "busy")}


def _own(value: Any) -> Any:
    return value.copy() if type(value) in (list, dict) else value


def restore(before: State) -> None:
    """Go back to what `state_of` found."""
    layer, old = before[0]
    ledger, bytes_now = getattr(layer, "ledger", None), getattr(layer, "_bytes", 0)
    for part, state in before:
        part.__dict__.update(state)
    if ledger is not None:
        ledger.change(bytes_now, old["_bytes"])
