"""No memory for a tensor: a change that fails leaves the cache as it was, and done again gives what it always gives."""

from __future__ import annotations

import shutil

import failing
import pytest

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return failing.build(tmp_path_factory.mktemp("failing"))


def failures(library, *arguments: str) -> dict[str, int]:
    """Allocations that failed, by what failed."""
    return {
        name: int(number) for name, number in (line.rsplit(maxsplit=1) for line in failing.run(library, *arguments))
    }


def test_every_allocation_of_these_changes(library):
    names = (
        "first update",
        "update of a plain layer",
        "update of many tokens",
        "pack",
        "reorder",
        "crop of a plain layer",
    )
    found = failures(library, "failing_tensors:changes", *names)
    assert list(found) == list(names) and all(found.values()) and found["pack"] > 20


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_allocation_of_all_changes(library):
    found = failures(library, "failing_tensors:changes")
    assert len(found) == 17 and all(found.values()) and sum(found.values()) > 300


@pytest.mark.exhaustive
@pytest.mark.slow
def test_every_allocation_of_a_forward_pass(library):
    """The model's own, too: the pass breaks off, and can be repeated after `crop`. Packing waits for the next call."""
    found = failures(library, "failing_tensors:passes")
    assert list(found) == ["prompt", "step", "step that packs", "chunk"]
    assert all(refused > 50 for refused in found.values())
