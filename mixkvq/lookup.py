"""The one line of transformers that is replaced: how an attention module looks its function up.

Other libraries may replace the same line. One that came before us is asked first and put back by `uninstall`. One that
came after us keeps its place: our look-up stays below it and passes functions through unchanged, until `install` makes
it work again. One that put ours aside without asking it is noticed by `blindness`, and asked first from the next
`install` on.
"""

from __future__ import annotations

import functools
import os
import threading
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
_placed: list[tuple[type, str, Any, Any]] = []
"""Where our look-ups were put: class, method, what the class itself had there (or None), ours. More than one only if
another library puts the first aside, which it may bring back when it goes."""


def _forbidden() -> bool:
    return os.environ.get("MIXKVQ_HOOK", "on") == "off"


def install(through: Callable[[Attention], Attention]) -> None:
    """Have ``through`` applied to every attention function that is looked up, unless ``MIXKVQ_HOOK=off``."""
    global _through
    with _lock:
        if _forbidden():
            return
        if _on_top() is None and not (_placed and _asked()):
            _placed.append(_place())
        _through = through


def uninstall() -> None:
    """Leave transformers as it was, or as another library made it since. May be called at any time."""
    global _through
    with _lock:
        _through = _unchanged
        while (top := _on_top()) is not None:
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
        return otherwise if _asked() else reasons.HOOK_REPLACED


def _place() -> tuple[type, str, Any, Any]:
    owner, name = compat.attention_lookup()
    original = getattr(owner, name)

    @functools.wraps(original)
    def lookup(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = original(self, *args, **kwargs)
        return function if is_compiling() else _through(function)

    placed = owner, name, owner.__dict__.get(name), lookup
    setattr(owner, name, lookup)
    return placed


def _on_top() -> tuple[type, str, Any, Any] | None:
    """The one of our look-ups that transformers calls first, if it is one of ours."""
    return next((p for p in _placed if p[0].__dict__.get(p[1]) is p[3]), None)


def _asked() -> bool:
    """Whether a look-up reaches ours, through whatever others put around it."""
    global _through
    seen, through, this_thread = [], _through, threading.get_ident()

    def watch(function: Attention) -> Attention:
        if threading.get_ident() == this_thread:
            seen.append(function)
        return through(function)

    _through = watch
    try:
        compat.look_up()
    except Exception:  # another library's look-up: whatever it dislikes, ours was reached or not
        pass
    finally:
        _through = through
    return bool(seen)
