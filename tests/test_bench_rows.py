"""Rows: pairing, ratios by hand, and the way to a file and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("scipy")

from mixkvq.bench.rows import Log, Row, cells, paired, read, times_faster
from mixkvq.errors import UserError
from mixkvq.eval.stats import Interval, median_interval

WHERE = {"tokens": 4096, "threads": 1}


def row(system: str, seconds: list[float | None], **where: int) -> Row:
    return Row("kernels", {**WHERE, **where}, system, seconds)


def test_median_and_best_leave_out_rounds_without_a_turn() -> None:
    found = row("a", [3.0, None, 1.0, 2.0])
    assert (found.median, found.best) == (2.0, 1.0)


def test_ratios_are_taken_inside_rounds() -> None:
    """A slow round slows both, and the ratio does not see it."""
    ours, rival = row("a", [1.0, None, 10.0, 2.0]), row("b", [2.0, 9.0, 20.0, 4.0])
    assert [x.tolist() for x in paired(ours, rival)] == [[1.0, 10.0, 2.0], [2.0, 20.0, 4.0]]
    assert times_faster(ours, rival) == Interval(2.0, 2.0, 2.0)
    assert times_faster(rival, ours).value == 0.5


def test_the_interval_of_a_median() -> None:
    """Of 41 values in order, binomial(41, 1/2) puts the median's 95 % interval at the 15th and 27th, give or take."""
    found = median_interval(np.arange(1.0, 42.0))
    assert found.value == 21 and 14 <= found.low <= 16 and 26 <= found.high <= 28


def test_a_few_slow_rounds_do_not_move_a_ratio() -> None:
    ours = row("a", [1.0] * 60 + [50.0] * 4)
    assert times_faster(ours, row("b", [3.0] * 64)) == Interval(3.0, 3.0, 3.0)


def test_rows_that_did_not_take_turns_are_refused() -> None:
    with pytest.raises(ValueError, match="must have taken turns"):
        paired(row("a", [1.0]), row("b", [1.0], threads=2))
    with pytest.raises(ValueError, match="no round in common"):
        paired(row("a", [1.0, None]), row("b", [None, 1.0]))


def test_cells_are_rows_of_one_place() -> None:
    rows = [row("a", [1.0]), row("a", [2.0], threads=2), row("b", [3.0])]
    assert [list(cell) for cell in cells(rows)] == [["a", "b"], ["a"]]


def test_there_and_back(tmp_path: Path) -> None:
    machine = {"CPU": "one", "read rate": {"1": 4e10}}
    log = Log(tmp_path / "new" / "kernels.jsonl", machine)
    rows = [row("a", [1.5e-6, None]), Row("kernels", WHERE, "b", [0.1, 0.2], {"nbytes": 7, "resident": True})]
    for each in rows:
        log.add(each)
    assert log.rows == rows and read(log.path) == (machine, rows)
    assert list(json.loads(log.path.read_text().splitlines()[0])) == ["machine"]
    Log(log.path, machine)
    assert read(log.path) == (machine, [])  # a run replaces the last one


@pytest.mark.parametrize("text", ["", "{}\n", "no JSON\n", '{"machine": {}}\n{"bench": "kernels"}\n'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(UserError, match="is no file of `mixkvq bench`"):
        read(file)
    with pytest.raises(UserError, match="cannot be written"):
        Log(file / "rows.jsonl", {})
