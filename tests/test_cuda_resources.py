"""The table of `make cuda`: a spill, a budget exceeded and a kernel without a budget fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "lanes/cuda_resources.py"
SYMBOL = "_ZN41_GLOBAL__N__57b30200_9_append_cu_c4a7de2013{name}ENS_10append_jobE"


def judged(folder: Path, *, name: str = "unpack_kernel", registers: int = 40, stack: int = 0, spills: int = 0):
    symbol = SYMBOL.format(name=name)
    log = folder / "append.log"
    log.write_text(
        f"ptxas info    : Compiling entry function '{symbol}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {symbol}\n"
        f"    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, 16 bytes smem, 696 bytes cmem[0]\n"
    )
    return subprocess.run([sys.executable, str(SCRIPT), str(log)], capture_output=True, text=True)


def test_a_kernel_within_its_budget(tmp_path):
    done = judged(tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split() for line in done.stdout.splitlines()][1] == ["unpack_kernel", "40", "16", "0", "0"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"spills": 4}, "unpack_kernel on sm_90a spills 8 bytes"),
        (
            {"registers": 65},
            "unpack_kernel on sm_90a takes 65 registers and 0 bytes of stack, must stay within 64",
        ),
        ({"stack": 8}, "unpack_kernel on sm_90a takes 40 registers and 8 bytes of stack, must stay within 64 and 0"),
        ({"name": "secret_kernel"}, "secret_kernel has no budget: add it to BUDGETS in cuda_resources.py"),
    ],
)
def test_what_fails(tmp_path, fields, message):
    done = judged(tmp_path, **fields)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_a_kernel_of_the_same_name_in_another_file_hides_none(tmp_path):
    judged(tmp_path, spills=4)
    worse = (tmp_path / "append.log").rename(tmp_path / "a.log")
    judged(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(worse), str(tmp_path / "append.log")], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("unpack_kernel on sm_90a spills 8 bytes")


def test_no_kernels_are_a_failure(tmp_path):
    (tmp_path / "empty.log").touch()
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "empty.log")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no kernels were compiled" in done.stderr
