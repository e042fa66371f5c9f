"""The corpora of `make fuzz`, replayed without libFuzzer: what once mattered keeps its properties.

`make sanitize` replays them under sanitizers.
"""

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


def test_corpora_keep_their_properties(tmp_path):
    """With the objects of the package, if this checkout has them: nothing is compiled but the targets."""
    kept = ROOT / "build/objects"
    command = (sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", kept)
    run(*command, MIXKVQ_TORCH="off", MIXKVQ_CUDA="off")
    sources = [*(ROOT / "csrc").glob("*.c"), *(ROOT / "csrc/cpu").glob("*.c")]
    objects = [path for source in sources if (path := kept / f"mixkvq._core/{source.stem}.o").exists()]
    for target in TARGETS:
        program = [FUZZ / f"{target}.c", FUZZ / "replay.c", *objects]
        run(*CC, "-std=c11", "-O1", "-Icsrc", *program, "-lm", "-o", tmp_path / target)
        files = sorted((CORPORA / target).iterdir())
        assert len(files) >= 10
        assert run(tmp_path / target, *files) == f"{len(files)} files\n"


def test_files_that_once_were_trouble():
    pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("fuzz_files", FUZZ / "files.py")
    assert spec and spec.loader
    files = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(files)
    outcomes = {path.name: files.load(path) for path in sorted((CORPORA / "files").iterdir())}
    assert len(outcomes) >= 3
    assert set(outcomes.values()) <= {"ValueError", "CacheFileError", "loaded"}
