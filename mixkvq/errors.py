"""Errors that name what the user can mend."""

from __future__ import annotations

_EXTRAS = {"optuna": "calibrate", "lm_eval": "eval", "scipy": "bench"}


class UserError(Exception):
    """Something the user can mend, printed without a traceback; the message names argument or package, and remedy."""


class CacheFileError(ValueError):
    """A file that `MixKVQCache.load` cannot take; the message names the file, what is wrong with it and the remedy."""


def install_line(extra: str) -> str:
    """How to install an extra of this package."""
    return f"pip install 'mixkvq[{extra}]'"


def missing_package(error: ModuleNotFoundError, what: str) -> BaseException:
    """The error to raise when an optional package is not installed: one of ours stays the bug that it is."""
    name = (error.name or "").split(".")[0]
    if not name or name == "mixkvq":
        return error
    remedy = install_line(_EXTRAS.get(name, "demo"))
    return UserError(
        f"{what} needs the package {name}, which is not installed: {remedy}  (`mixkvq info` works without)"
    )
