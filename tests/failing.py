"""Allocations that fail on demand: `tests/failing_malloc.c` in a process of its own."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLAIN, ALIGNED = 1, 2
"""malloc, calloc, realloc; and memory on a boundary, as torch takes it for tensors."""


def build(folder: Path) -> Path:
    """The library."""
    library = folder / "failing_malloc.so"
    command = [*os.environ.get("CC", "cc").split(), "-O1", "-shared", "-fPIC", "-fno-builtin", "-o", library]
    subprocess.run([*command, HERE / "failing_malloc.c", "-ldl"], check=True)
    return library


def run(library: Path, function: str, *arguments: str) -> list[str]:
    """The lines that a function of a module of this folder prints, in a process where allocations can fail."""
    module, _, name = function.partition(":")
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {module}; {module}.{name}(*sys.argv[1:])"
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


# ---- in that process -----------------------------------------------------------------------------------------------
def _library() -> Any:
    library = ctypes.CDLL(None)
    library.failing_arm.argtypes = ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_char_p
    library.failing_disarm.restype = library.failing_site.restype = ctypes.c_long
    return library


@contextmanager
def failing(kinds: int, n: int, *, onward: bool = False, module: bytes = b"") -> Iterator[dict[str, int]]:
    """The n-th allocation inside fails, ``onward``: and all after it; afterwards: how many did, and from where."""
    library, found = _library(), {"failed": 0, "site": 0}
    library.failing_arm(kinds, n, onward, module)
    try:
        yield found
    finally:
        found["failed"] = library.failing_disarm()
        found["site"] = library.failing_site()


def every(
    attempt: Callable[[], Any], kinds: int, *, onward: bool = False, module: bytes = b"", most: int = 5000
) -> Iterator[tuple[BaseException | None, int]]:
    """Let the first allocation of a call fail, then the second, until none is left: (what it raised, from where)."""
    for n in range(1, most):
        error: BaseException | None = None
        with failing(kinds, n, onward=onward, module=module) as found:
            try:
                attempt()
            except BaseException as raised:
                error = raised
        if not found["failed"]:
            return
        yield error, found["site"]
    raise AssertionError(f"more than {most} allocations")
