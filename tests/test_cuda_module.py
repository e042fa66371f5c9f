"""`mixkvq._cuda` where it was built: what it offers, also on a machine without a GPU or its driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from mixkvq import _core

_cuda = pytest.importorskip("mixkvq._cuda", reason="mixkvq._cuda was not built")

LOADED = """
import json, sys
from mixkvq import _cuda
at_import = [line.split()[-1] for line in open("/proc/self/maps") if "libcud" in line]
try:
    devices = _cuda.devices()
except RuntimeError as error:
    devices = str(error)
print(json.dumps([at_import, _cuda.versions(), devices]))
"""


def test_what_it_was_built_for_is_told():
    assert _cuda.built == _core.build_info()["cuda_kernels"]
    assert _cuda.built.startswith("CUDA ")
    assert " sm_" in _cuda.built
    assert _cuda.__version__ == _core.__version__
    assert '"mixkvq._cuda._C_API"' in repr(_cuda._C_API)


def test_it_can_be_imported_where_no_gpu_can_be_used():
    """The driver is looked for at the first call only, and what is missing is said in words."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADED],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    at_import, (runtime, driver), devices = json.loads(done.stdout)
    assert at_import == []
    assert runtime >= 12000
    assert driver >= 0
    assert devices == [] or "(CUDA error " in devices


def test_devices_are_described_where_there_are_some():
    if not _cuda.versions()[1]:
        pytest.skip("no CUDA driver here")
    for name, major, minor, memory in _cuda.devices():
        assert name
        assert (major, minor) >= (5, 0)
        assert memory > 0
