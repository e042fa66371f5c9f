"""Builds the CUDA kernels for the host: their own source over csrc/cuda/emulate.*, as a shared library.

Variants: "plain"; "thread" and "address" are built with that sanitizer (address: and the one of undefined behaviour),
whose runtime must be loaded before all else: ``python tests/emulator_build.py thread COMMAND`` builds the library and
runs a command so. An object is kept under a name that tells its source, all headers and the command; what changes is
compiled again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/emulator"
SANITIZERS = {
    "plain": [],
    "thread": ["-fsanitize=thread"],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
}
WARNINGS = ["-Wall", "-Wextra", "-Wshadow"] + ["-Werror"] * (os.environ.get("MIXKVQ_WERROR") == "1")
FLAGS = ["-O2", "-g", "-fPIC", "-ffp-contract=off", "-DMKVQ_EMULATE", *WARNINGS]
CXX = shlex.split(os.environ.get("CXX") or "g++")


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    return None if shutil.which(CXX[0]) else f"the emulator needs a C++ compiler, and {CXX[0]} is not found"


def kernels() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").glob("*.cu"))


def core() -> list[Path]:
    """What the kernels' host side calls, and sizes of structs for the mirrors in emulator_structs.py."""
    return [*sorted((ROOT / "csrc").glob("*.c")), ROOT / "tests/emulator_sizes.c"]


def _command(source: Path, variant: str) -> list[str]:
    if source.suffix == ".c":
        return [*CXX, "-x", "c", "-std=c11", *FLAGS, *SANITIZERS[variant]]
    if source.name == "emulate.cpp":  # stands for the hardware: a sanitizer sees only what it tells
        # of loops the compiler would make calls of memset and memcpy, which a sanitizer sees
        told = ["-DMKVQ_THREAD_SANITIZER"] if variant == "thread" else []
        return [*CXX, "-std=c++20", *FLAGS, "-fno-tree-loop-distribute-patterns", *told]
    return [*CXX, "-x", "c++", "-std=c++20", *FLAGS, *SANITIZERS[variant]]


def _compile(source: Path, variant: str, headers: bytes) -> Path:
    command = [*_command(source, variant), "-I", str(ROOT / "csrc/cuda"), "-c", str(source)]
    key = hashlib.sha256(headers + source.read_bytes() + shlex.join(command).encode()).hexdigest()[:16]
    stem = f"{variant}-{source.name}-"
    target = FOLDER / f"{stem}{key}.o"
    if not target.exists():
        half = target.with_suffix(".half")
        done = subprocess.run([*command, "-o", str(half)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stderr}")
        for old in FOLDER.glob(f"{stem}*.o"):
            old.unlink()
        half.rename(target)
    return target


def build(variant: str = "plain", *, name: str = "mixkvq_emulated", sources: Sequence[Path] | None = None) -> Path:
    """The library of all kernels and the core's checks, or of ``sources``, built if it is not there yet."""
    if variant not in SANITIZERS:
        raise ValueError(f"variant is {variant!r}, must be one of {', '.join(map(repr, SANITIZERS))}")
    if problem := missing():
        raise RuntimeError(problem)
    FOLDER.mkdir(parents=True, exist_ok=True)
    library = FOLDER / f"lib{name}{'' if variant == 'plain' else '-' + variant}.so"
    with (FOLDER / "lock").open("w") as lock:  # of several processes that test one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        headers = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*h")))
        files = [ROOT / "csrc/cuda/emulate.cpp", *([*kernels(), *core()] if sources is None else sources)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(lambda source: str(_compile(source, variant, headers)), files))
        command, note = [*CXX, "-shared", *objects, *SANITIZERS[variant]], library.with_suffix(".command")
        if not library.exists() or not note.exists() or note.read_text() != shlex.join(command):
            note.unlink(missing_ok=True)
            half = library.with_suffix(".half")  # a process may have the old one loaded
            subprocess.run([*command, "-o", str(half)], check=True)
            half.rename(library)
            note.write_text(shlex.join(command))
    return library


def environment(variant: str) -> dict[str, str]:
    """What a Python that loads that variant needs in its environment. FileNotFoundError without its runtime."""
    runtimes = {"plain": [], "thread": ["libtsan.so"], "address": ["libasan.so", "libubsan.so"]}[variant]
    found = [
        subprocess.run([*CXX, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in runtimes
    ]
    if lost := [name for name in found if not Path(name).is_absolute()]:
        raise FileNotFoundError(f"{CXX[0]} has no {', '.join(lost)}")
    return {
        "MIXKVQ_EMULATOR": variant,
        "LD_PRELOAD": " ".join(found),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66",
        "ASAN_OPTIONS": "detect_leaks=0 abort_on_error=0 exitcode=66 detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1 halt_on_error=1 exitcode=66",
        "PYTHONMALLOC": "pymalloc" if variant == "plain" else "malloc",
    }


if __name__ == "__main__":
    build(sys.argv[1])
    os.execvpe(sys.argv[2], sys.argv[2:], os.environ | environment(sys.argv[1]))
