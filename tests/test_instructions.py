"""The programs that compare instruction counts and stack accesses with recorded ones: what they find and refuse."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

LISTING = """
0000000000000000 <dot_a>:
   0:\tvmovups (%rdi),%ymm0
   5:\tvfmadd231ps (%rsi),%ymm0,%ymm1
   a:\tvmovaps %ymm1,0x8(%rsp)
   f:\tcmp    0x10(%rsp),%rax
  14:\tjne    5 <dot_a+0x5>
  16:\tadd    $0x8,%rdi
  1a:\tjne    0 <dot_a>
  1c:\tjmp    40 <other>

0000000000000020 <other>:
  20:\tmov    %rsp,%rbp
  23:\tvmovaps -0x40(%rbp),%ymm0
  28:\tvmulps %ymm0,%ymm0,%ymm1
  2c:\tjne    23 <other+0x3>
"""


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """The modules of the folder benchmarks, with a baseline of their own."""
    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))
    loaded = {name: importlib.import_module(name) for name in ("baseline", "instructions", "spills")}
    monkeypatch.setattr(loaded["baseline"], "FILE", tmp_path / "baseline.json")
    yield loaded
    for name in loaded:
        sys.modules.pop(name, None)


def test_the_innermost_loop_and_its_stack_accesses_are_found(programs):
    spills = programs["spills"]
    bodies = spills.functions(LISTING)
    assert [len(body) for body in bodies.values()] == [8, 4]
    (loop,) = spills.innermost(bodies["dot_a"])
    assert [x.address for x in loop] == [0x5, 0xA, 0xF, 0x14]
    assert spills.stack_accesses(loop, bodies["dot_a"]) == ["vmovaps %ymm1,0x8(%rsp)"]  # a counter is no vector
    (framed,) = spills.innermost(bodies["other"])
    assert spills.stack_accesses(framed, bodies["other"]) == ["vmovaps -0x40(%rbp),%ymm0"]
    assert spills.count(bodies["dot_a"], "dot_a") == 1
    assert spills.count(bodies["other"], "other") == -1  # it only multiplies


def test_counts_beyond_the_slack_are_told_apart(programs, capsys):
    compare = programs["instructions"].compare
    recorded = {"same": 1000, "slower": 1000, "faster": 1000, "just": 1000, "gone": 5}
    counts = {"same": 1000, "slower": 1031, "faster": 969, "just": 1029, "new": 3}
    assert compare(counts, recorded) == (["slower"], ["gone", "faster", "new"])
    assert "+3.10%" in capsys.readouterr().out
    assert compare(counts, None) == ([], [])
    assert "not compared" in capsys.readouterr().out


def test_an_unknown_compiler_is_said(programs, monkeypatch, capsys):
    baseline = programs["baseline"]
    monkeypatch.setattr(baseline, "compiler_name", lambda: "gcc 1.2.3")
    assert baseline.load("instructions") is None
    assert "NOT COMPARED: no instructions recorded for gcc 1.2.3 (recorded: none)" in capsys.readouterr().out
    baseline.record("instructions", {"x": 1})
    baseline.record("stack accesses", {"f": 0})
    assert baseline.load("instructions") == {"x": 1}
    assert json.loads(baseline.FILE.read_text()) == {
        "gcc 1.2.3": {"instructions": {"x": 1}, "stack accesses": {"f": 0}}
    }
    monkeypatch.setattr(baseline, "compiler_name", lambda: "gcc 9")
    assert baseline.load("instructions") is None
    assert "recorded: gcc 1.2.3" in capsys.readouterr().out


def test_the_compiler_is_named(programs):
    kind, version = programs["baseline"].compiler_name().split()
    assert kind in ("gcc", "clang")
    assert version.split(".")[0].isdigit()
