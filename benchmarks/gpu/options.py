"""What every program takes: the device, or a rehearsal without one; where rows go; how long it may take."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .record import Log, device_name, machine
from .timing import Deadline


def parse(
    description: str | None, arguments: list[str] | None, more: argparse.ArgumentParser | None = None
) -> argparse.Namespace:
    """The options, with ``device``, ``log`` and ``deadline`` made from them.

    Parameters
    ----------
    description : str
        Of which the first line is shown.
    arguments : list of str or None
        Default: those of the command line.
    more : ArgumentParser, optional
        Options of the program itself.
    """
    parser = argparse.ArgumentParser(
        description=(description or "").splitlines()[0], parents=[more] if more else [], conflict_handler="resolve"
    )
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--seconds", type=float, default=120, help="stop before more than this has passed")
    parser.add_argument("--rounds", type=int, help="turns of every case")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU: the same code without a GPU")
    options = parser.parse_args(arguments)
    options.device = "cpu" if options.rehearse else "cuda"
    if not options.rehearse and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU that torch can use; --rehearse runs tiny sizes on the CPU")
    options.rounds = options.rounds or (2 if options.rehearse else 15)
    options.deadline = Deadline(options.seconds)
    options.log = Log(options.out, device_name(options.device))
    machine(options.log)
    return options
