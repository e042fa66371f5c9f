"""Whether the innermost loops of the hot kernels keep their sums in registers.

``python benchmarks/spills.py`` disassembles the AVX2 kernels that the last build left in ``build/objects`` and prints,
for the loops without a loop inside them that multiply and add in the functions named ``dot*`` and ``search_octet``:
their instructions and how many of them read or write vectors on the stack, where compilers put what does not fit into
sixteen registers. A function with more of them in a loop than ``baseline.json`` records for the compiler is a failure;
``--record`` records them. (Sums on the stack cost about a factor of two; a mask or a word there costs little.)
"""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from dataclasses import dataclass

import baseline

OBJECT = baseline.OBJECTS / "kernels_avx2.o"
KIND = "stack accesses"
HOT = re.compile(r"(dot\w*|search_octet)(\.\w+)*")
MULTIPLIES = re.compile(r"vf(n?m(add|sub))|vpmadd|vpdp")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly."""

    address: int
    text: str

    @property
    def target(self) -> int | None:
        """Where a jump inside the file goes, or None."""
        found = re.match(r"j\w+\s+([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """Instructions of every function that ``objdump -d --no-show-raw-insn`` prints."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in disassembly.splitlines():
        if name := re.match(r"[0-9a-f]+ <(.+)>:", line):
            body = found.setdefault(name[1], [])
        elif code := re.match(r"\s*([0-9a-f]+):\s+(.*)", line):
            body.append(Instruction(int(code[1], 16), code[2]))
    return found


def innermost(body: list[Instruction]) -> list[list[Instruction]]:
    """Loops that contain no other: from the target of a backward jump to the jump."""
    spans = [(x.target, x.address) for x in body if x.target is not None and body[0].address <= x.target <= x.address]
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [[x for x in body if begin <= x.address <= end] for begin, end in sorted(set(inner))]


def stack_accesses(loop: list[Instruction], body: list[Instruction]) -> list[str]:
    """Instructions of a loop that read or write vectors on the stack; %rbp counts where it is the frame's."""
    framed = any(re.match(r"mov\s+%rsp,%rbp", x.text) for x in body)
    stack = re.compile(r"\((%rsp|%rbp)" if framed else r"\(%rsp")
    return [x.text for x in loop if stack.search(x.text) and "mm" in x.text]


def count(body: list[Instruction], name: str) -> int:
    """Print a row of the loops that multiply, and one per loop that spills; the most stack accesses, or -1: no loop."""
    loops = [loop for loop in innermost(body) if any(MULTIPLIES.match(x.text) for x in loop)]
    touched = [len(stack_accesses(loop, body)) for loop in loops]
    if loops:
        sizes = f"{min(map(len, loops))} ... {max(map(len, loops))}"
        print(f"| `{name}` | {len(loops)} loops | {sizes} | {max(touched)} |")
    for loop, n in zip(loops, touched, strict=True):
        if n:
            print(f"| | at {loop[0].address - body[0].address:#x} | {len(loop)} | {n} |")
    return max(touched, default=-1)


def main() -> int:
    """Print the table, then compare or record; 1 if a function spills more than recorded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="make the counts of this build the recorded ones")
    options = parser.parse_args()
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"NOT CHECKED: {platform.machine()} has no AVX2")
        return 0
    if not OBJECT.exists():
        sys.exit(f"{OBJECT} is missing: build the package here first")
    command = ["objdump", "-d", "--no-show-raw-insn", str(OBJECT)]
    listing = functions(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("| function | loops | instructions | stack accesses |\n|---|---:|---:|---:|")
    found = {name: count(body, name) for name, body in sorted(listing.items()) if HOT.fullmatch(name)}
    counts = {name: n for name, n in found.items() if n >= 0}
    if not counts:
        sys.exit(f"no loop was found in {OBJECT}: the names of the hot functions have changed")
    if options.record:
        baseline.record(KIND, counts)
        return 0
    recorded = baseline.load(KIND)
    worse = {n for n in counts if recorded is not None and counts[n] > recorded.get(n, 0)}
    for name in sorted(worse):
        allowed = (recorded or {}).get(name, 0)
        print(f"SPILLS: {name} has {counts[name]} stack accesses in a loop, {allowed} are recorded")
    missing = sorted(set(recorded or {}) - set(counts))
    for name in missing:
        print(f"MISSING: {name} is recorded and was not found")
    return 1 if worse or missing else 0


if __name__ == "__main__":
    sys.exit(main())
