"""The table that `test_matrix.py` prints, from reports that are made up."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from matrix_table import MARKS, Table, abridged, brief


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
                report("llama", "sdpa", "crop", "DynamicCache fails too: ValueError: no `crop`. More"),
                report("bart", "sdpa", "crop", "DynamicCache fails too: ValueError: no `crop`. More"),
                report("bart", "sdpa", "pickle", "no"),
                SimpleNamespace(nodeid="another test", user_properties=[], longrepr=("", 1, "")),
            ],
        }
    )


def test_rows_and_notes(table: Table) -> None:
    assert table.markdown().splitlines()[2:] == [
        "| bart | sdpa | - | 0 | 1 | notes 1 and 2 |",
        "| llama | eager, sdpa | 1 native, 2 packed | 2 | 0 | note 1 |",
        "",
        "Scenarios that do not apply; in quotes, the error with which `DynamicCache` fails there:",
        "",
        "1. crop: `ValueError: no 'crop'`",
        "2. pickle: no",
    ]


def test_the_same_reason_for_several_scenarios_is_one_note():
    skipped = [report("llama", "sdpa", name, f"DynamicCache fails too: E: {i} of it") for i, name in enumerate("ba")]
    assert (
        Table.of({"passed": [report("llama", "sdpa", "c")], "skipped": skipped}).markdown().splitlines()[-1]
        == "1. a, b: `E: N of it`"
    )


def test_a_family_that_transformers_lacks():
    skipped = [report("beam", "sdpa", name, "transformers 5.0 has no Beam") for name in ("crop", "pickle")]
    table = Table.of({"passed": [report("llama", "sdpa", "beams")], "skipped": skipped})
    assert table.markdown().splitlines()[2] == "| beam | sdpa | - | 0 | 0 | note 1 |"
    assert table.markdown().splitlines()[-1] == "1. everything: transformers 5.0 has no Beam"


def test_names_that_begin_alike():
    every = {"chunk_of_16", "chunk_of_32", "chunk_of_64", "crop", "crop_more", "crop_most", "beams"}
    assert abridged(every, every) == ["beams", "chunk_of_*", "crop", "crop_more", "crop_most"]
    assert abridged({"chunk_of_16", "chunk_of_64"}, every) == ["chunk_of_16", "chunk_of_64"]
    assert abridged(every - {"chunk_of_32"}, every) == sorted(every - {"chunk_of_32"})


@pytest.mark.parametrize(
    "reason, said",
    [
        ("it has no mask. It needs 1", "it has no mask. It needs 1"),
        ("DynamicCache fails too: E: a `b` is 3.5 of (47), not c2.Then more", "`E: a 'b' is N.5 of (N), not c2`"),
        ("DynamicCache fails too: E: size 3 but got size 4 ...", "`E: size N but got size N ...`"),
    ],
)
def test_reasons_in_brief(reason, said):
    assert brief(reason) == said


def test_paths_are_those_seen_with_each_attention():
    seen = {"sdpa": "packed packed", "eager": "dequantized dequantized or packed packed"}
    table = Table.of({"failed": [report("llama", name, "greedy", path=path) for name, path in seen.items()]})
    (row,) = table.rows.values()
    assert row.path == "eager: 2 dequantized or 2 packed; sdpa: 2 packed"


def test_scenarios_that_are_tried_on_few_families():
    tried = [("llama", "threads"), ("bart", "threads"), ("llama", "pairs"), ("bart", "pairs"), ("llama", "compiled")]
    table = Table.of({"passed": [report(family, "sdpa", name, sample=name) for family, name in tried]})
    assert table.markdown().splitlines()[-1] == (
        "What does not depend on the family was tried on a few of them: compiled on llama; "
        "pairs and threads on bart and llama."
    )


def test_it_is_written_between_marks(table, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    table.write(file)
    assert file.read_text() == f"before\n{MARKS[0]}\n\n{table.markdown()}\n\n{MARKS[1]}\nafter\n"
    file.write_text("no marks")
    with pytest.raises(ValueError, match=r"--table is .*page\.md, must be a file with the lines"):
        table.write(file)
