"""How fast the device copies and reads memory, and whether tensor cores take subnormal operands as they are.

``python -m gpu.rates --subnormals build/gpu-subnormals``; the program is made from `subnormals.cu`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from typing import NamedTuple

import torch

from .options import parse
from .record import Log
from .timing import Case, take_turns

BYTES = 4 << 30
"""Of each array: many times any cache."""


class Rates(NamedTuple):
    """Bytes per second."""

    copy: float
    """Read and written, both counted, by a plain device copy."""
    read: float
    """Read, by the faster of two reductions."""
    nbytes: int
    """Of the array that is copied or read."""


def measure(device: str, rounds: int, nbytes: int = BYTES) -> Rates:
    """Copy and read rate: medians over rounds."""
    most = 16 << 20 if device == "cpu" else torch.cuda.get_device_properties(0).total_memory // 8
    nbytes = min(nbytes, most // 4096 * 4096)
    source = torch.randint(1 << 20, (nbytes // 4,), dtype=torch.int32, device=device)
    target, numbers = torch.empty_like(source), source.view(torch.float32)
    copy = Case("copy", lambda: target.copy_(source), most=4)
    reads = [Case("sum", lambda: numbers.sum(), most=4), Case("max", lambda: numbers.amax(), most=4)]
    take_turns([copy, *reads], device, rounds)
    return Rates(2 * nbytes / copy.median, nbytes / min(case.median for case in reads), nbytes)


def record(log: Log, rates: Rates) -> None:
    """A row about the rates."""
    log.add("rate", "memory", {"bytes": rates.nbytes}, {"copy_gbps": rates.copy / 1e9, "read_gbps": rates.read / 1e9})


def subnormals(log: Log, program: str | None) -> str:
    """A row about `subnormals.cu`, and a sentence."""
    if program is None:
        log.add("rate", "subnormal operands", {}, {"ratio": None}, why="no program given")
        return "subnormal operands: not checked"
    done = subprocess.run([program], capture_output=True, text=True)
    if not done.stdout.strip():
        log.add("rate", "subnormal operands", {}, {"ratio": None}, why=done.stderr.strip() or f"exit {done.returncode}")
        return f"subnormal operands: not checked ({done.stderr.strip()})"
    found = json.loads(done.stdout)
    log.add("rate", "subnormal operands", {"shape": "m16n8k16"}, found)
    exact = "exact" if found["wrong"] == 0 else f"WRONG in {found['wrong']} of 128 sums"
    return (
        f"subnormal operands: {exact}, {found['subnormal_tflops']:.0f} TFLOP/s, "
        f"{found['ratio']:.3f} of the rate of normal ones"
    )


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line."""
    more = argparse.ArgumentParser(add_help=False)
    more.add_argument("--subnormals", metavar="PROGRAM", help="what nvcc made of subnormals.cu")
    options = parse(__doc__, arguments, more)
    rates = measure(options.device, options.rounds)
    record(options.log, rates)
    about = subnormals(options.log, options.subnormals)
    print(f"== copy {rates.copy / 1e9:.0f} GB/s (read and written), read {rates.read / 1e9:.0f} GB/s; {about}")


if __name__ == "__main__":
    main()
