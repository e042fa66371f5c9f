"""What kernels take of a GPU, from the files that setup.py leaves of ptxas -v: python cuda_resources.py LOG...

Prints a table of kernels and parts, and fails where a register is spilled to memory, a budget is exceeded, or a kernel
has none.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Registers per thread, and bytes of the stack for what is indexed at run time. 65,536 registers of a multiprocessor
# serve as many blocks at once as __launch_bounds__ of a kernel asks for; these are what its occupancy was planned with.
BUDGETS = {
    "append_kernel": (64, 0),
    "attend_4_rows": (128, 0),
    "attend_8_rows": (128, 0),
    "count_kernel": (32, 0),
    "layer_kernel": (128, 32),
    "pack_kernel": (128, 32),
    "salience_kernel": (96, 0),
    "unpack_kernel": (64, 0),
}


@dataclass
class Use:
    """Of one kernel on one part; bytes, but for registers."""

    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0

    def __str__(self) -> str:
        return f"{self.registers} {self.shared} {self.stack} {self.spills}"


def read(log: str) -> Iterator[tuple[str, str, Use]]:
    """(symbol, part, use) of every kernel in what ptxas has said."""
    entry, use = None, Use()
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            entry, use = found.groups(), Use()
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, found.groups())  # of the kernel, or of a function that it calls
            use.stack, use.spills = max(use.stack, stack), use.spills + stores + loads
        elif found := re.search(r"Used (\d+) registers", line):
            if entry is None:
                raise ValueError(f"registers of no kernel: {line}")
            shared, total = (re.search(rf"(\d+) bytes {what}", line) for what in ("smem", "cumulative stack size"))
            use.registers, use.shared = int(found[1]), int(shared[1]) if shared else 0
            use.stack = max(use.stack, int(total[1]) if total else 0)
            yield (*entry, use)
            entry = None
    if entry is not None:
        raise ValueError(f"nothing is said of {entry}")


def names(symbols: list[str]) -> list[str]:
    """Of functions, without namespaces and parameters."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), check=True, capture_output=True, text=True)
    plain = [re.sub(r"\(anonymous namespace\)::|^void ", "", name) for name in done.stdout.splitlines()]
    return [re.sub(r"\(.*\)$", "", name) for name in plain]


def faults(name: str, part: str, use: Use) -> Iterator[str]:
    if use.spills:
        yield f"{name} on {part} spills {use.spills} bytes"
    budget = BUDGETS.get(re.sub(r"<.*", "", name))
    if budget is None:
        yield f"{name} has no budget: add it to BUDGETS in {Path(__file__).name}"
    elif use.registers > budget[0] or use.stack > budget[1]:
        found = f"{use.registers} registers and {use.stack} bytes of stack"
        yield f"{name} on {part} takes {found}, must stay within {budget[0]} and {budget[1]}"


def main() -> None:
    uses = [use for path in sys.argv[1:] for use in read(Path(path).read_text())]
    every = [(name, part, use) for name, (_, part, use) in zip(names([use[0] for use in uses]), uses, strict=True)]
    found = {(name, part): use for name, part, use in every}
    kernels = list(dict.fromkeys(name for name, _ in found))
    parts = sorted({part for _, part in found}, key=lambda part: int(re.sub(r"\D", "", part)))
    if not kernels:
        sys.exit("cuda lane: no kernels were compiled")
    rows = [["registers, bytes of static shared memory, stack, spills", *parts]]
    rows += [[name, *(str(found.get((name, part), "-")) for part in parts)] for name in kernels]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    wrong = list(dict.fromkeys(fault for name, part, use in every for fault in faults(name, part, use)))
    print(f"{len(kernels)} kernels for {len(parts)} parts:", "" if wrong else "no spills, all within their budgets")
    sys.exit("\n".join(wrong) or 0)


main()
