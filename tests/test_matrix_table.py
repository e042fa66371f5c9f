"""The table that `test_matrix.py` prints, from reports that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from matrix_table import MARKS, Table


def report(name: str, attention: str, scenario: str, why: str = "", **about: str) -> SimpleNamespace:
    """A test's, with these properties besides."""
    return SimpleNamespace(
        nodeid=f"tests/test_matrix.py::test[{name}-{attention}-{scenario}]",
        user_properties=[("family", name), ("attention", attention), *about.items()],
        longrepr=("file", 1, f"Skipped: {why}"),
    )


@pytest.fixture
def table() -> Table:
    return Table.of(
        {
            "passed": [
                report("llama", "sdpa", "greedy", path="native packed packed"),
                report("llama", "eager", "greedy", path="native packed packed"),
            ],
            "failed": [report("bart", "sdpa", "beams")],
            "skipped": [
                report("llama", "sdpa", "crop", "DynamicCache fails too"),
                report("bart", "sdpa", "crop", "DynamicCache fails too"),
                report("bart", "sdpa", "pickle", "no"),
                SimpleNamespace(nodeid="another test", user_properties=[], longrepr=("", 1, "")),
            ],
        }
    )


def test_rows_and_notes(table: Table) -> None:
    assert table.markdown().splitlines()[2:] == [
        "| llama | eager, sdpa | 1 native, 2 packed | 2 | 0 | crop [1] |",
        "| bart | sdpa | - | 0 | 1 | crop [1]; pickle [2] |",
        "",
        "1. DynamicCache fails too",
        "2. no",
    ]


def test_paths_are_those_seen_with_each_attention():
    seen = {"sdpa": "packed packed", "eager": "dequantized dequantized or packed packed"}
    table = Table.of({"failed": [report("llama", name, "greedy", path=path) for name, path in seen.items()]})
    (row,) = table.rows.values()
    assert row.path == "eager: 2 dequantized or 2 packed; sdpa: 2 packed"


def test_scenarios_that_are_tried_on_few_families():
    table = Table.of({"passed": [report(name, "sdpa", "threads", sample="threads") for name in ("llama", "bart")]})
    assert table.markdown().splitlines()[-1] == "Not a matter of the family, and tried on few: threads (bart, llama)."


def test_it_is_written_between_marks(table, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    table.write(file)
    assert file.read_text() == f"before\n{MARKS[0]}\n\n{table.markdown()}\n\n{MARKS[1]}\nafter\n"
    file.write_text("no marks")
    with pytest.raises(ValueError, match=r"--table is .*page\.md, must be a file with the lines"):
        table.write(file)
