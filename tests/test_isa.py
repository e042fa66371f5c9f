"""Instruction sets: the level that is forced is the one that runs, and all levels give the same records."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import break_kernels
import numpy as np
import pytest

import mixkvq
from mixkvq import _core, arrays
from mixkvq.config import MixKVQConfig

SUPPORTED = [name for name, supported in _core.isas() if supported]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")
@pytest.mark.skipif(platform.machine() not in break_kernels.UNDEFINED, reason="an undefined instruction is not known")
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_forced_level_is_the_one_that_runs(name):
    """A process lives on with all kernels of all other levels destroyed, and dies of each of its own."""
    environment = os.environ | {"MIXKVQ_ISA": name, "PYTHONPATH": str(Path(mixkvq.__file__).parents[1])}
    command = [sys.executable, "-P", break_kernels.__file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outcomes = json.loads(result.stdout)
    assert outcomes.pop("nothing") == outcomes.pop("other levels") == 0
    assert len(outcomes) >= 5
    assert set(outcomes.values()) == {-signal.SIGILL}, outcomes


def test_levels_are_different_code():
    tables = break_kernels.kernel_tables()
    assert set(tables) == {name for name, _ in _core.isas()}
    kernels = [address for table in tables.values() for address in table]
    assert len(set(kernels)) == len(kernels)


@pytest.mark.parametrize("preset", ["paper", "compact", "default", "near-lossless", "kivi-2", "kivi-4"])
def test_levels_agree_to_the_last_bit(preset):
    """Records of all levels; attention of those that fuse multiply and add, which all but scalar do."""
    rng = np.random.default_rng(7)
    k, v = rng.standard_normal((2, 1, 1, 200, 96), np.float32) * 3
    queries = [rng.standard_normal((1, rows, 1, 96), np.float32) for rows in range(1, 9)]
    codec = MixKVQConfig.preset(preset, sink_length=0).codec(96, "float32")
    records, outputs, before = {}, {}, _core.isa()
    try:
        for name in SUPPORTED:
            _core.set_isa(name)
            packed = arrays.pack(codec, k, v)
            records[name] = packed.records, None if packed.mu is None else packed.mu.tobytes()
            outputs[name] = [
                arrays.attend(q, packed.records, k[:, :, 128:], v[:, :, 128:], [72], mu=packed.mu, precision=precision)
                for q in queries
                for precision in ("default", "exact", "fast")
            ]
    finally:
        _core.set_isa(before)
    fused = [name for name in SUPPORTED if name != "scalar"]
    for name in fused:
        assert records[name] == records["scalar"]
        for i, (got, want) in enumerate(zip(outputs[name], outputs[fused[0]], strict=True)):
            assert got.tobytes() == want.tobytes(), (name, i)
