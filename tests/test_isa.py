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
import pytest

import mixkvq
from mixkvq import _core

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
