"""The command line. ``info`` needs NumPy only; every other command needs the extra ``demo``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ..errors import UserError, missing_package

__all__ = ["UserError", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program name; default ``sys.argv[1:]``. Nothing at all means ``info``.

    Returns
    -------
    int
        Exit status: 0, 1 when something is wrong with the machine or the input, 2 for a wrong command line.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] == "info":
            from .info import main as info

            return info(args[1:])
        if args == ["--version"]:
            from ..version import __version__

            print(f"mixkvq {__version__}")
            return 0
        try:
            from .app import run
        except ModuleNotFoundError as error:
            raise missing_package(error, f"mixkvq {args[0]}") from error
        return run(args)
    except UserError as error:
        print(f"mixkvq: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mixkvq: interrupted", file=sys.stderr)
        return 130
