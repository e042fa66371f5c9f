"""Counts recorded for a compiler, in ``baseline.json``: what the same source compiles to differs between compilers."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

Counts = dict[str, int]

FILE = Path(__file__).with_name("baseline.json")
OBJECTS = Path("build/objects/mixkvq._core")
"""Where `setup.py` leaves the objects of the core."""


def compiler() -> list[str]:
    """The C compiler that `setup.py` uses."""
    return shlex.split(os.environ.get("CC") or "cc")


def compiler_name() -> str:
    """Its name and version, such as ``gcc 12.2.0``."""

    def ask(flag: str) -> str:
        return subprocess.run([*compiler(), flag], check=True, capture_output=True, text=True).stdout.strip()

    if "clang" in ask("--version").splitlines()[0]:
        return f"clang {ask('-dumpversion')}"
    return f"gcc {ask('-dumpfullversion')}"


def load(kind: str) -> Counts | None:
    """Counts of one kind for this compiler, or None, after saying that there are none."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if kind in known.get(compiler_name(), {}):
        return dict(known[compiler_name()][kind])
    has = ", ".join(sorted(name for name in known if kind in known[name])) or "none"
    print(f"NOT COMPARED: no {kind} recorded for {compiler_name()} (recorded: {has}); record with --record")
    return None


def record(kind: str, counts: Counts) -> None:
    """Make these the counts of this compiler."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known.setdefault(compiler_name(), {})[kind] = counts
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"recorded {len(counts)} {kind} for {compiler_name()} in {FILE}")
