"""What every change of a layer goes through: one thread at a time, and all or nothing.

`MixKVQLayer` marks itself as in use (``busy``) while it changes or while the kernel reads it, `MixKVQCache` while what
its layers have in common does. Who needs all of a cache marks all (`alone_with`).

A change that fails, for lack of memory or by Ctrl-C, is taken back. One that overwrites what could be needed for that,
the window when a block leaves it, marks the store as torn until it is done: a store that is found torn says that the
cache must be emptied.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from transformers.cache_utils import Cache

if TYPE_CHECKING:
    from .layer import MixKVQLayer

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
State = list[tuple[Any, dict[str, Any]]]


class Begun(NamedTuple):
    """What is noted of a layer when a forward pass begins: see `passes`."""

    length: int
    alike: tuple[int, int] | None
    """The same for layers that must be of one length; None for one without tokens."""


NOT_YET = Begun(0, None)

BROKEN = -1
"""`busy` of a layer whose store is torn."""
short = 1
"""`busy` of a layer on the short path of decoding. A thread marks with its identity more than this.

In a process made by `os.fork()` it is larger than every mark from before: those are of threads that are not there, even
if a new one gets the identity of one of them.
"""
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
class InUse(RuntimeError):
    """A layer or a cache is in use by another thread, or torn. Nothing has changed."""


def refusal(thing: Any) -> InUse:
    """The error for a layer, or a cache, that is torn or in use."""
    which = "this" if isinstance(thing, Cache) else "layer of a" if thing.index is None else f"layer {thing.index} of a"
    return InUse(f"{which} MixKVQCache {TORN if 0 != thing.busy < short else ANOTHER_THREAD}")


def _in_forked_process() -> None:
    global short
    short += 1 << 64  # identities have no more bits


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_forked_process)


def exclusive(method: F) -> F:
    """A method of a layer or a cache that no other thread may interfere with.

    Raises
    ------
    InUse
        If another thread uses it, or it is torn; nothing has changed then.
    """

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        me = short + get_ident()
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


def alone_with(things: Iterable[Any], do: Callable[[], T], *, emptying: bool = False) -> T:
    """Do something while no other thread can change any of these layers and caches.

    Parameters
    ----------
    things : iterable
        Taken one by one, so that those behind a cache may be read from it once it is taken.
    do : callable
    emptying : bool
        It makes torn ones whole, and may be a part of what this thread is doing with them. Without this they must be in
        nobody's hands: a signal handler runs in the thread that it interrupts.

    Raises
    ------
    InUse
        If one of them is in use, or torn; nothing has changed then.
    """
    me, held, done = short + get_ident(), dict[Any, int](), False
    try:
        for thing in things:
            was = thing.busy
            if was == me and emptying:
                continue
            if was >= short or (was and not emptying):
                raise refusal(thing)
            held[thing] = was  # neither a thread nor Ctrl-C comes between the question and the mark: there is no call
            thing.busy = me
        result = do()
        done = True
        return result
    finally:
        try:
            _release(held, me, done)
        except BaseException:  # Ctrl-C
            _release(held, me, done)
            raise


def _release(held: dict[Any, int], me: int, done: bool) -> None:
    for thing, was in held.items():
        if thing.busy == me:
            torn = thing.store is not None and thing.store.torn
            thing.busy = BROKEN if torn or (was and not done) else 0


def mark_of_copy(thing: Any) -> int:
    """`busy` of a copy of a layer or a cache.

    Raises
    ------
    InUse
        If another thread uses it.
    """
    was = thing.busy
    if was >= short and was != short + get_ident():
        raise refusal(thing)
    torn = thing.store is not None and thing.store.torn
    return BROKEN if torn or 0 != was < short else 0


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
