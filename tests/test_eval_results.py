"""Measurements on disk: found again, cut lines made again, foreign files left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixkvq.errors import UserError
from mixkvq.eval.results import Results

KEY = {"measure": "kl", "scheme": "default", "window": 3}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "results.jsonl"


def test_nothing_is_written_before_the_first_measurement(file: Path) -> None:
    assert Results(file).find(KEY) is None and not file.parent.exists()


def test_measurements_are_found_again(file: Path) -> None:
    first = Results(file)
    first.add(KEY, {"kl": [0.1, 0.25], "bits": None})
    first.add({**KEY, "window": 4}, {"kl": []})
    again = Results(file)
    reordered = dict(reversed(KEY.items()))
    for results in (first, again):
        assert results.find(reordered) == {"kl": [0.1, 0.25], "bits": None}
        assert results.find({**KEY, "window": 4}) == {"kl": []}
        assert results.find({**KEY, "window": "3"}) is None and results.find({"measure": "kl"}) is None
    assert [json.loads(line)["key"]["window"] for line in file.read_text().splitlines()] == [3, 4]


def test_the_last_of_two_equal_measurements_counts(file: Path) -> None:
    results = Results(file)
    results.add(KEY, {"kl": 1})
    results.add(KEY, {"kl": 2})
    assert results.find(KEY) == Results(file).find(KEY) == {"kl": 2}


def test_every_cut_of_the_last_line_is_dropped_and_measured_again(file: Path) -> None:
    results = Results(file)
    results.add(KEY, {"kl": 1})
    kept = file.read_bytes()
    results.add({**KEY, "window": 4}, {"kl": 2})
    whole = file.read_bytes()
    for cut in range(len(kept), len(whole)):
        file.write_bytes(whole[:cut])
        again = Results(file)
        assert again.find(KEY) == {"kl": 1} and again.find({**KEY, "window": 4}) is None
        assert file.read_bytes() == kept
    again.add({**KEY, "window": 4}, {"kl": 2})
    assert file.read_bytes() == whole


def test_a_cut_first_line_is_dropped(file: Path) -> None:
    file.parent.mkdir()
    for cut in ('{"k', '{"key": {"a": 1}, "val'):
        file.write_text(cut)
        assert Results(file).find({"a": 1}) is None and file.read_bytes() == b""


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"scheme,kl\ndefault,0.1\n", 1),
        (b"a letter to a friend", 1),
        (b'{"key": {}, "values": {}}\n\n', 2),
        (b'{"key": {}, "values": {}}\n[1]\n', 2),
        (b'{"key": {}}\n', 1),
        (b"\xff\xfe\x00\n", 1),
        (b"3\ntorn", 1),
    ],
)
def test_foreign_files_are_refused_and_left_as_they_are(content: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"results.jsonl line {line} is no measurement.*--out"):
        Results(path)
    assert path.read_bytes() == content


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Results(tmp_path)
