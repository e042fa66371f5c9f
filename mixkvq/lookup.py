"""The one thing of transformers that is replaced: how an attention module looks its function up, `compat.LOOKUPS`.

Other libraries may replace the same methods, of the class or of transformers' one instance. One that came before us is
asked first and put back by `uninstall`. One that came after us keeps its place: our look-up stays below it and passes
functions through unchanged, until `install` makes it work again. One that put ours aside without asking it is noticed
by `blindness`, and asked first from the next `install` on.
"""

from __future__ import annotations

import functools
import os
import threading
import types
from collections.abc import Callable
from typing import Any

from torch.compiler import is_compiling

from . import compat, reasons
from .identity import Attention
from .reasons import Reason


def _unchanged(function: Attention) -> Attention:
    return function


_lock = threading.Lock()
_through: Callable[[Attention], Attention] = _unchanged
"""What becomes of a function that was looked up; `_unchanged` while the hook is out."""
_done: types.CodeType | None = None
_Placed = tuple[Any, str, Any, Any]
_placed: list[_Placed] = []
"""Where our look-ups were put: class or instance, method, what itself had there (or None), ours. More than one of a
method only if another library puts the first aside, which it may bring back when it goes."""


def _forbidden() -> bool:
    asked = os.environ.get("MIXKVQ_HOOK") or "on"
    if asked not in ("on", "off"):
        raise ValueError(f"MIXKVQ_HOOK is {asked!r}, must be 'on' or 'off'")
    return asked == "off"


def install(through: Callable[[Attention], Attention], done: types.CodeType) -> None:
    """Have ``through`` applied to every attention function that is looked up, unless ``MIXKVQ_HOOK=off``.

    ``done`` is the code of all functions that it gives: somebody may have registered one of them.
    """
    global _through, _done
    with _lock:
        if _forbidden():
            return
        for name in compat.LOOKUPS:
            if not any(_on_top(p) and p[0] is _owner(name) for p in _placed if p[1] == name) and not _asked(name):
                _placed.append(_place(name))
        _through, _done = through, done


def uninstall() -> None:
    """Leave transformers as it was, or as another library made it since. May be called at any time."""
    global _through
    with _lock:
        _through = _unchanged
        while (top := next(filter(_on_top, _placed), None)) is not None:
            owner, name, original, _ = top
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
            _placed.remove(top)


def blindness(otherwise: Reason = reasons.INVISIBLE) -> Reason:
    """Why attention that was just computed was not seen; ``otherwise`` if the hook is in place."""
    with _lock:
        if _through is _unchanged:
            return reasons.HOOK_FORBIDDEN if _forbidden() else reasons.HOOK_OUT
        return otherwise if all(map(_asked, compat.LOOKUPS)) else reasons.HOOK_REPLACED


def _owner(name: str) -> Any:
    """Whose method is called: the instance's, if somebody gave it one (those with underscores are the class's)."""
    owner, instance = compat.attention_lookup()[0], compat.ATTENTION_FUNCTIONS
    return instance if name in vars(instance) and not name.startswith("_") else owner


def _place(name: str) -> _Placed:
    owner = _owner(name)
    original = getattr(owner, name)

    @functools.wraps(original)
    def lookup(*args: Any, **kwargs: Any) -> Any:
        function = original(*args, **kwargs)
        if getattr(function, "__code__", None) is _done or is_compiling():
            return function
        return _through(function)

    placed = owner, name, vars(owner).get(name), lookup
    setattr(owner, name, lookup)
    return placed


def _on_top(placed: _Placed) -> bool:
    """Whether a look-up of ours is where it was put."""
    owner, name, _, lookup = placed
    return vars(owner).get(name) is lookup


def _asked(name: str) -> bool:
    """Whether this way of looking up reaches ours, through whatever others put around it."""
    global _through
    seen, through, this_thread = [], _through, threading.get_ident()

    def watch(function: Attention) -> Attention:
        if threading.get_ident() == this_thread:
            seen.append(function)
        return through(function)

    _through = watch
    try:
        compat.look_up(name)
    except Exception:  # another library's look-up: whatever it dislikes, ours was reached or not
        pass
    finally:
        _through = through
    return bool(seen)
