"""The corpora of `make fuzz`, replayed without libFuzzer: what once mattered keeps its properties."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FUZZ, CORPORA = ROOT / "tests/fuzz", ROOT / "tests/data/fuzz"
TARGETS = ("arguments", "isa", "records", "roundtrip")
SANITIZERS = "-O1 -g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
CC = shlex.split(os.environ.get("CC") or "cc")

pytestmark = [
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests lie apart from the sources"),
    pytest.mark.skipif(shutil.which(CC[0]) is None, reason=f"no C compiler ({CC[0]})"),
]


def run(*command: object, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def replay(folder: Path, made: Path, flags: str = "", **environment: str) -> dict[str, int]:
    """Build the core in a folder that keeps its objects, and replay all corpora; returns how many inputs each has."""
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", made, "--build-temp", folder)
    run(*command, MIXKVQ_TORCH="off", MIXKVQ_CUDA="off", **environment)
    sources = [*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc/cpu").glob("*.c")]
    objects = [path for source in sources if (path := folder / f"mixkvq._core/{source.stem}.o").exists()]
    counts = {}
    for target in TARGETS:
        program = [FUZZ / f"{target}.c", FUZZ / "replay.c", *objects]
        run(*CC, "-std=c11", *(flags or "-O1").split(), "-Icsrc", *program, "-lm", "-o", made / target)
        files = sorted((CORPORA / target).iterdir())
        counts[target] = len(files)
        assert run(made / target, *files) == f"{len(files)} files\n"
    return counts


def test_corpora_keep_their_properties(tmp_path):
    """With the objects of the package, if this checkout has them: nothing is compiled but the targets."""
    assert min(replay(ROOT / "build/objects", tmp_path).values()) >= 10


@pytest.mark.exhaustive
@pytest.mark.slow
def test_corpora_read_nothing_outside(tmp_path):
    """Under AddressSanitizer and UBSan, with objects that are kept as long as nothing changes."""
    assert min(replay(ROOT / "build/replay", tmp_path, SANITIZERS, CFLAGS=SANITIZERS).values()) >= 10


def test_files_that_once_were_trouble():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("fuzz_files", FUZZ / "files.py")
    assert spec and spec.loader
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    outcomes = {path.name: files.load(path) for path in sorted((CORPORA / "files").iterdir())}
    assert len(outcomes) >= 3
    assert set(outcomes.values()) <= {"ValueError", "CacheFileError", "loaded"}
