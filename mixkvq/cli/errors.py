"""Errors that the command line prints without a traceback."""

from __future__ import annotations

EXTRA = "pip install 'mixkvq[demo]'"


class CliError(Exception):
    """Something the user can mend; the message names the argument or the package and the remedy."""


def missing_package(error: ModuleNotFoundError, what: str) -> BaseException:
    """The error to raise when an optional package is not installed: one of ours stays the bug that it is."""
    name = (error.name or "").split(".")[0]
    if not name or name == "mixkvq":
        return error
    return CliError(f"{what} needs the package {name}, which is not installed: {EXTRA}  (`mixkvq info` works without)")
