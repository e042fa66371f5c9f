"""Forward passes: one that broke off is noticed before another one computes with what it left, and can be undone.

Layers get their tokens one after the other. After an error or Ctrl-C in the middle of a pass some have its tokens and
some have not; computed on, such a cache would give wrong answers without a word. So the cache notes the length of every
layer when a pass begins, that is when the model asks for the size of its masks. Layers that were of one length when it
first did so must be so whenever a pass begins; others, such as those that hold an image, are on their own. A pass of
another thread that is under way looks the same.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident
from typing import Any, TypeVar

from transformers.cache_utils import Cache, CacheLayerMixin

from . import compat, guard
from .guard import ANOTHER_THREAD, NOT_YET, Begun, InUse, exclusive, restore, state_of
from .layer import MixKVQLayer
from .report import tensors_in

T = TypeVar("T")
_BROKE_OFF = "a forward pass of a MixKVQCache broke off"


class Passes(Cache):
    """The part of a cache that knows where a forward pass stands; `MixKVQCache` has the rest."""

    _last: int
    _awaiting: bool
    busy = 0  # of what is no layer of ours: see `guard`
    store = None

    def _no_pass(self) -> None:
        """Forget about passes: the cache is empty."""
        self._runner = 0  # the thread of the pass; negative: it has asked for masks and added nothing yet
        self._overtaken: set[int] = set()  # threads that had asked for masks when another one went on
        self._queries = 0  # tokens of the pass
        self._passes = 0  # how many have begun
        self._begun: dict[int, Begun] = {}  # of transformers' layers by index; ours know theirs
        self._continued = False  # whether there were any tokens when it began
        self._apart: frozenset[int] = frozenset()  # layers that do not grow with the text, once the model is known
        self._states: set[tuple[int, str, int]] = set()  # linear states that it has changed: layer, kind, number
        self._with_states: set[int] = set()  # layers of which earlier ones have changed any

    def __getstate__(self) -> dict[str, Any]:
        busy, *_ = map(guard.mark_of_copy, self._parts())
        return {**self.__dict__, "_runner": 0, "_overtaken": set(), "busy": busy}  # a copy is in no thread's hands

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.alone(lambda: self.copied(memo))

    def copied(self, memo: dict[int, Any]) -> Any:
        """A deep copy. Nobody else is there: see `alone`."""
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return new

    # ---- where it stands -------------------------------------------------------------------------------------------
    @exclusive
    def _begin_pass(self, queries: int, asked: Any) -> None:
        """A model asks for the mask of a layer: in the middle of a pass, if others have got its tokens and it has not.

        Raises
        ------
        RuntimeError
            If the pass before has not come to its end; nothing has changed then.
        """
        me = get_ident()
        if self._runner != -me:
            standing = list(self._standing())
            grown = [layer for _, layer, begun, length in standing if length != begun.length]
            if grown and not any(layer is asked for layer in grown):
                return
            if (ragged := _ragged(standing)) is not None:
                if self._elsewhere():
                    why = f"this MixKVQCache {ANOTHER_THREAD}, or its forward pass there broke off: {ragged}."
                    raise InUse(f"{why} cache.reset() empties the cache then")
                raise RuntimeError(f"{_BROKE_OFF}: {ragged}. {self._remedy()}")
            self._passes += 1
            self._continued = False
            for index, layer, begun, length in standing:
                self._continued |= isinstance(layer, MixKVQLayer) and length > 0
                alike = begun.alike or ((self._passes, length) if length else None)
                alike = None if index in self._apart else alike
                self._note(index, layer, Begun(length, alike))
            self._overtake(me)
            self._runner = -me
        self._queries = queries

    def _standing(self) -> Iterator[tuple[int, Any, Begun, int]]:
        """(index, layer, what was noted of it when the pass began, its length now)."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, MixKVQLayer):
                yield index, layer, layer.begun, layer.length
            elif isinstance(layer, CacheLayerMixin):
                yield index, layer, self._begun.get(index, NOT_YET), _now(layer)

    def _note(self, index: int, layer: Any, begun: Begun) -> None:
        if isinstance(layer, MixKVQLayer):
            layer.begun = begun
        else:
            self._begun[index] = begun

    def ragged(self) -> str | None:
        """What tells that a pass has not come to its end, if anything does."""
        return _ragged(self._standing())

    def half_done(self) -> str | None:
        """As `ragged`, or what tells it of layers with a linear state, outside of a pass."""
        changed = {layer for layer, *_ in self._states}
        if changed and (missing := self._with_states - changed):
            return f"layer {min(changed)} has a new linear state, layer {min(missing)} has not"
        return self.ragged()

    def _check_state(self, layer: int, kind: str, number: int) -> None:
        """A linear state will change: for the second time, in another pass."""
        if (layer, kind, number) in self._states:
            if (half := self.half_done()) is not None:
                raise RuntimeError(f"{_BROKE_OFF}: {half}. {self._remedy()}")
            self._with_states |= {layer for layer, *_ in self._states}
            self._states = set()

    def _changed_state(self, layer: int, kind: str, number: int) -> None:
        """A linear state has changed."""
        self._states.add((layer, kind, number))

    def _lacking(self) -> dict[int, int]:
        """By index: how many tokens a layer has less than others that were of its length."""
        noted = [(index, begun.alike, length) for index, _, begun, length in self._standing() if begun.alike]
        longest: dict[Any, int] = {}
        for _, alike, length in noted:
            longest[alike] = max(longest.get(alike, 0), length)
        return {index: longest[alike] - length for index, alike, length in noted}

    def _remedy(self) -> str:
        ahead = max(self._lacking().values(), default=0)
        length = max((length for *_, length in self._standing()), default=0)
        number = -ahead if compat.VERSION >= (5, 14) else length - ahead
        undo = f"cache.crop({number}) takes back what it added; " if ahead > 0 and not self._states else ""
        return f"{undo}cache.reset() empties the cache"

    # ---- threads ---------------------------------------------------------------------------------------------------
    def _elsewhere(self) -> bool:
        """Whether the last pass is of another thread that has not ended."""
        return self._runner > 0 and self._runner != get_ident() and self._runner in sys._current_frames()

    def _check_thread(self) -> None:
        if self._elsewhere() and self.ragged() is not None:
            broke = "if its forward pass there broke off, cache.reset() empties the cache"
            raise InUse(f"this MixKVQCache {ANOTHER_THREAD}; {broke}")

    def _overtake(self, me: int) -> None:
        """Who has asked for masks and is late: they are wrong once another thread has added tokens."""
        if self._runner < 0 and self._runner != -me:
            self._overtaken.add(-self._runner)
        self._overtaken.discard(me)

    def _join(self) -> None:
        """The first update of a pass, or one in another thread than the last."""
        me = get_ident()
        if me in self._overtaken:
            self._overtaken.discard(me)
            raise InUse(f"this MixKVQCache {ANOTHER_THREAD}")
        self._check_thread()
        self._overtake(me)
        self._runner = me

    def _check_first_tokens(self, index: int, key: Any) -> None:
        """Refuse the first tokens of a layer in a pass that the layers before it began with tokens."""
        if index not in self._apart and self._continued and tuple(getattr(key, "shape", ())[-2:-1]) == (self._queries,):
            raise RuntimeError(
                f"{_BROKE_OFF}, its first: layer {index} has no tokens, others have. cache.reset() empties the cache"
            )

    def _late(self) -> set[int]:
        """Threads that must not go on with their passes once this one has emptied the cache."""
        self._overtake(get_ident())
        under_way = self._elsewhere() and self.ragged() is not None
        return self._overtaken | ({self._runner} if under_way else set())

    def _parts(self) -> Iterator[Any]:
        """What threads mark: the cache, then its layers."""
        yield self
        yield from (layer for layer in self.layers if isinstance(layer, MixKVQLayer))

    def alone(self, do: Callable[[], T]) -> T:
        """Do something that needs all of the cache, and no pass of another thread under way.

        Raises
        ------
        InUse
            If another thread uses it, or a layer is torn; nothing has changed then.
        """

        def checked() -> T:
            self._check_thread()
            return do()

        self._check_thread()  # at first so that a pass that is between two layers finds no mark
        return guard.alone_with(self._parts(), checked)

    # ---- all layers, or none ---------------------------------------------------------------------------------------
    def _wholly(self, change: Callable[[], None]) -> None:
        """Change all layers, or, after an error, none. Nobody else is there: see `alone`."""
        self._overtake(get_ident())
        self._runner = 0
        before = [state_of(layer) for layer in self.layers]
        try:
            change()
        except BaseException:
            for state in before:
                restore(state)
            raise

    def crop(self, tokens_to_remove: Any) -> None:
        """Remove tokens from the end, as `Cache.crop`; of transformers' layers, those without any cannot be asked.

        After a forward pass that broke off the end is that of the layers that have its tokens, so that removing them
        makes the cache whole again. What the pass packed comes back from the records, as after every `crop`.

        Raises
        ------
        ValueError, RuntimeError
            For a number that the installed transformers does not take, or a layer of its own that cannot go back. No
            layer has changed then.
        """
        self.alone(lambda: self._crop(tokens_to_remove))

    def _crop(self, tokens_to_remove: Any) -> None:
        ragged, number = self.half_done() is not None, int(tokens_to_remove)
        if ragged and self._states:
            raise RuntimeError(f"{_BROKE_OFF}, and linear states cannot go back: cache.reset() empties the cache")
        behind = self._lacking() if ragged else {}
        noted = list(self._standing())

        def crop() -> None:
            layers: Iterable[Any] = self.layers
            for index, layer in enumerate(layers):
                lacking = behind.get(index, 0) if number < 0 else 0
                if (isinstance(layer, MixKVQLayer) or not _is_blank(layer)) and not 0 < -number <= lacking:
                    layer.crop(number + lacking)
                if ragged and isinstance(layer, MixKVQLayer):
                    layer.waiting = False  # its attention never came

        self._wholly(crop)
        for index, layer, begun, _ in noted:
            self._note(index, layer, Begun(_now(layer), begun.alike))
        if ragged:
            self._last, self._awaiting = -1, False
        for layer in self.layers:
            if isinstance(layer, MixKVQLayer):
                layer.rolled_back()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Rows ``beam_idx`` of every layer, in this order; after an error no layer has changed."""
        self.alone(lambda: self._wholly(lambda: super(Passes, self).reorder_cache(beam_idx)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times; the copies share records. After an error no layer has changed."""
        self.alone(lambda: self._wholly(lambda: super(Passes, self).batch_repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Any) -> None:
        """Only the rows ``indices``; after an error no layer has changed."""
        self.alone(lambda: self._wholly(lambda: super(Passes, self).batch_select_indices(indices)))


Standing = Iterable[tuple[int, Any, Begun, int]]


def _ragged(standing: Standing) -> str | None:
    first: dict[Any, tuple[int, int]] = {}
    for index, _, begun, length in standing:
        if begun.alike and (other := first.setdefault(begun.alike, (index, length)))[1] != length:
            return f"layer {other[0]} has {other[1]} tokens, layer {index} has {length}"
    return None


def _now(layer: Any) -> int:
    return layer.length if isinstance(layer, MixKVQLayer) else int(layer.get_seq_length())


def _is_blank(layer: Any) -> bool:
    """Whether a layer never had keys, values or states."""
    held = {name: value for name, value in vars(layer).items() if name != "_sliding_window_tensor"}
    return next(iter(tensors_in(held)), None) is None
