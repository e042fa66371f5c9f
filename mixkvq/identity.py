"""Which function an attention call used, by what it is and not by name: functions that one factory makes share a name.

Two function objects are one if they are made of the same things: code and everything it closes over, a method and its
object, a `functools.partial` and its arguments. So a library may wrap a function anew at every look-up. Functions are
remembered without being kept alive, since they may close over a whole model.
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

Attention = Callable[..., Any]

_DEPTH = 4  # of functions made of functions
_VALUES = bool, int, float, str, types.NoneType


class Identity:
    """Tells one thing from all others.

    A copy made in this process stands for the same thing; an unpickled one too if the thing is a function that can be
    imported by its name, else for none.

    Parameters
    ----------
    thing : object
        An attention function, or what one is made of.
    depth : int
        How many times to look into what it is made of.

    Attributes
    ----------
    thing : callable
        Gives the thing while it lives.
    """

    __slots__ = ("_parts", "thing")

    def __init__(self, thing: Any, depth: int = _DEPTH) -> None:
        parts = _parts(thing) if depth else None
        self._parts = None if parts is None else tuple(Identity(part, depth - 1) for part in parts)
        self.thing: Callable[[], Any] = _nothing
        try:
            self.thing = weakref.ref(thing)
        except TypeError:
            if isinstance(thing, _VALUES) or (parts is None and callable(thing)):
                self.thing = lambda: thing

    def of(self, thing: Any) -> bool:
        """Whether this is the thing."""
        mine = self.thing()
        if mine is thing:
            return mine is not _NOTHING
        if isinstance(thing, _VALUES):
            return type(mine) is type(thing) and bool(mine == thing)
        if self._parts is None:
            return False
        parts = _parts(thing)
        return (
            parts is not None
            and len(parts) == len(self._parts)
            and all(mine.of(part) for mine, part in zip(self._parts, parts, strict=True))
        )

    def __deepcopy__(self, _: Any) -> Identity:
        return self

    def __reduce__(self) -> tuple[type[Identity], tuple[Any, ...]]:
        thing = self.thing()
        return Identity, ((thing, _DEPTH) if _importable(thing) else (_NOTHING, 0))


class _Nothing:
    def __reduce__(self) -> str:
        return "_NOTHING"


_NOTHING = _Nothing()


def _importable(thing: Any) -> bool:
    """Whether this is a function that pickle refers to by its name."""
    found = sys.modules.get(thing.__module__) if isinstance(thing, types.FunctionType) else None
    for name in getattr(thing, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is not None and found is thing


def _nothing() -> Any:
    return _NOTHING


def _parts(thing: Any) -> tuple[Any, ...] | None:
    """What a function is made of; None for anything else."""
    if isinstance(thing, types.FunctionType):
        defaults, named = thing.__defaults__ or (), thing.__kwdefaults__ or {}
        try:
            closure = [cell.cell_contents for cell in thing.__closure__ or ()]
        except ValueError:  # a name that has no value yet
            return None
        return thing.__code__, *closure, *defaults, *named, *named.values()
    if isinstance(thing, types.MethodType):
        return thing.__func__, thing.__self__
    if isinstance(thing, functools.partial):
        return thing.func, *thing.args, *thing.keywords, *thing.keywords.values()
    return None
