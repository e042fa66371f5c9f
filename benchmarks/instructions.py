"""Instructions of fixed decode, flush and salience calls, against those recorded for the compiler.

``python benchmarks/instructions.py`` links `instructions.c` with the objects that the last build left in
``build/objects``, runs it under valgrind for every level, and compares what each call executed with ``baseline.json``.
Counts do not depend on what else the machine does: two runs of the same objects give the same. More than `SLACK` above
the recorded count fails; as much below asks to record the new one (``--record``). Valgrind 3.19 has no AVX-512.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import baseline

LEVELS = ("scalar", "avx2") if platform.machine() in ("x86_64", "AMD64") else ("scalar",)
SLACK = 0.03
KIND = "instructions"
PROGRAM = Path("build/instructions")
SOURCE = Path(__file__).with_name("instructions.c")


def build() -> None:
    """Link the driver with the core."""
    sources = [*Path("csrc").glob("*.c"), *Path("csrc/cpu").glob("*.c")]
    objects = [baseline.OBJECTS / f"{source.stem}.o" for source in sources]
    built = sorted(str(path) for path in objects if path.exists())
    if not built:
        sys.exit(f"no objects in {baseline.OBJECTS}: build the package here first")
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-missing-field-initializers", "-Werror", "-Icsrc"]
    subprocess.run([*baseline.compiler(), *flags, str(SOURCE), *built, "-lm", "-o", str(PROGRAM)], check=True)


def count(level: str, names: list[str]) -> baseline.Counts:
    """Instructions of every case at one level."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        counting = [f"--callgrind-out-file={out}", "--toggle-collect=measure", "--dump-after=measure"]
        command = ["valgrind", "--tool=callgrind", *counting, str(PROGRAM), level]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr}")
        counts = {}
        for i, name in enumerate(names, 1):  # the i-th call's counts are dumped to out.i
            total = re.search(r"^totals: (\d+)$", Path(f"{out}.{i}").read_text(), re.MULTILINE)
            assert total and int(total[1]) > 0, f"nothing was counted for {name}"
            counts[f"{level}: {name}"] = int(total[1])
    return counts


def compare(counts: baseline.Counts, recorded: baseline.Counts | None) -> tuple[list[str], list[str]]:
    """Print a row per case; the cases that became slower, and those whose record is out of date."""
    if recorded is None:
        print("\n".join(f"| {name} | {n:,} | not compared |" for name, n in counts.items()))
        return [], []
    slower, stale = [], sorted(recorded.keys() - counts.keys())
    for name, n in counts.items():
        change = n / recorded[name] - 1 if name in recorded else None
        print(f"| {name} | {n:,} | {'new' if change is None else f'{change:+.2%}'} |")
        if change is None or change < -SLACK:
            stale.append(name)
        elif change > SLACK:
            slower.append(name)
    return slower, stale


def main() -> int:
    """Count, then compare or record; 1 if a case became slower."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--record", action="store_true", help="make the counts of this run the recorded ones")
    options = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("valgrind is not installed")
    build()
    names = subprocess.run([PROGRAM], check=True, capture_output=True, text=True).stdout.splitlines()
    counts = {name: n for level in LEVELS for name, n in count(level, names).items()}
    if options.record:
        baseline.record(KIND, counts)
        return 0
    recorded = baseline.load(KIND)
    print(f"| case | instructions, {baseline.compiler_name()} | change |\n|---|---:|---:|")
    slower, stale = compare(counts, recorded)
    if slower:
        print(f"SLOWER by more than {SLACK:.0%}: {', '.join(slower)}")
    if stale:
        print(f"record anew (--record): {', '.join(stale)}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
