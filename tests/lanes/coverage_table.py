"""What gcov counted, as a table of the files of csrc/: ``coverage_table.py OBJECTS LEAST``.

A line that several objects have (a body compiled once per instruction set, a header) counts once, and was run if any of
them ran it; so with its branches. Branches to exceptions of C++ are not counted: the compiler makes one of every call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from mixkvq import _core

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Counts:
    """Of one file: line -> times run; (line, place among its branches, their number) -> times taken."""

    lines: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    branches: dict[tuple[int, int, int], int] = field(default_factory=lambda: defaultdict(int))

    def add(self, line: dict) -> None:
        """A line of gcov's report."""
        number = line["line_number"]
        self.lines[number] += line["count"]
        taken = [branch["count"] for branch in line["branches"] if not branch["throw"]]
        for place, count in enumerate(taken):
            self.branches[number, place, len(taken)] += count

    def missing(self) -> list[int]:
        """Lines that were never run."""
        return sorted(number for number, count in self.lines.items() if not count)


def report(notes: Path) -> dict:
    """What gcov says of the object beside ``notes``."""
    command = [os.environ.get("GCOV") or "gcov", "--json-format", "--stdout", "--branch-probabilities", str(notes)]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)


def collect(objects: Path) -> dict[str, Counts]:
    """Path inside the repository -> what was counted there."""
    found: dict[str, Counts] = defaultdict(Counts)
    for notes in sorted(objects.rglob("*.gcno")):
        for file in report(notes)["files"]:
            path = (ROOT / file["file"]).resolve()
            if path.is_relative_to(ROOT / "csrc"):
                for line in file["lines"]:
                    found[str(path.relative_to(ROOT))].add(line)
    return found


def levels_not_here() -> set[str]:
    """Names of vec_<name>.h of which this CPU runs nothing."""
    return {f"csrc/cpu/vec_{name}.h" for name, supported in _core.isas() if not supported}


def ranges(numbers: list[int]) -> str:
    """ "3-5 9"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def row(name: str, lines: dict, branches: dict, remark: str = "") -> str:
    ran, taken = (sum(map(bool, each.values())) for each in (lines, branches))
    share = [
        f"{have}/{of} {100 * have / max(of, 1):5.1f} %" for have, of in ((ran, len(lines)), (taken, len(branches)))
    ]
    return f"{name:34} {share[0]:>18} {share[1]:>18}  {remark}".rstrip()


def main(objects: str, least: str) -> None:
    found, apart = collect(Path(objects)), levels_not_here()
    print(f"{'file':34} {'lines':>18} {'branches':>18}  lines that no test runs")
    lines: dict[tuple[str, int], int] = {}
    branches: dict[tuple[str, tuple[int, int, int]], int] = {}
    for name, counts in sorted(found.items()):
        if name in apart:
            print(f"{name:34} {'not counted: this CPU lacks it':>37}")
            continue
        print(row(name, counts.lines, counts.branches, ranges(counts.missing())))
        lines |= {(name, number): count for number, count in counts.lines.items()}
        branches |= {(name, place): count for place, count in counts.branches.items()}
    print(row("csrc/ without cuda/", lines, branches))
    share = 100 * sum(map(bool, lines.values())) / max(len(lines), 1)
    if share < float(least):
        sys.exit(f"{share:.1f} % of the lines are run, must be {least} % at least")


if __name__ == "__main__":
    main(*sys.argv[1:])
