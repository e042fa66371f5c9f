"""Options that are lists separated by commas."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UserError


def names(option: str, text: str, known: Iterable[str] | None = None) -> list[str]:
    """Names, each at most once; of the known ones, if these are given.

    Raises
    ------
    UserError
        Naming the option.
    """
    found = [name.strip() for name in text.split(",") if name.strip()]
    allowed = None if known is None else list(known)
    wrong = [name for name in found if allowed is not None and name not in allowed]
    if not found or wrong or len(set(found)) < len(found):
        what = "names" if allowed is None else f"some of {', '.join(allowed)}"
        raise UserError(f"{option} is {text!r}, must be {what}, each once, separated by commas")
    return found


def numbers(option: str, text: str) -> list[int]:
    """Positive integers, each at most once.

    Raises
    ------
    UserError
        Naming the option.
    """
    found = names(option, text)
    if not all(name.isdecimal() and int(name) > 0 for name in found):
        raise UserError(f"{option} is {text!r}, must be positive integers separated by commas")
    return [int(name) for name in found]


def at_least(option: str, value: int, least: int, most: int | None = None) -> None:
    """Check a number.

    Raises
    ------
    UserError
        Naming the option.
    """
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UserError(f"{option} is {value}, must be {allowed}")
