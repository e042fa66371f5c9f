"""No memory: at every place of the C extension that allocates, an error, and the next call does what it always did."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import failing
import pytest

pytest.importorskip("mixkvq._core", reason="the C core is not built")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")

BIND = Path(__file__).parent.parent / "csrc" / "bind"
MAKES = re.compile(
    r"\b(PyMem_Malloc|PyTuple_Pack|allocate\(type|PyList_New|PyList_Append|Py_BuildValue|PyBytes_FromStringAndSize|"
    r"PyCapsule_New|PyType_FromModuleAndSpec|PyModule_Add\w+|PyType_GetName)\b"
)
SAYS = re.compile(r"\bPyErr_(Format|SetString)\(")
TAIL = re.compile(
    r"return (PyLong|PyUnicode|Py_BuildValue)"
)  # with no code of ours after it, there is nothing to reach


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return failing.build(tmp_path_factory.mktemp("failing"))


def places_in_the_source(pattern: re.Pattern[str]) -> int:
    lines = [
        line for path in BIND.glob("*.c") if path.name != "cuda_module.c" for line in path.read_text().splitlines()
    ]
    return sum(len(pattern.findall(line)) for line in lines if not TAIL.search(line))


def swept(library: Path, what: str) -> tuple[dict[str, int], int]:
    """(allocations that failed, by call; places in the module that they came from)."""
    *lines, last = failing.run(library, "failing_bindings:sweep", what)
    calls = {name: int(number) for name, number in (line.rsplit(maxsplit=1) for line in lines)}
    return calls, int(last.split()[1])


def test_calls_without_memory(library):
    calls, places = swept(library, "working")
    assert len(calls) == 13 and places >= places_in_the_source(MAKES) > 10


@pytest.mark.exhaustive
@pytest.mark.slow
def test_errors_without_memory_to_tell_them(library):
    (calls, errors), (_, results) = swept(library, "refused"), swept(library, "working")
    assert len(calls) == 49 and all(calls.values())
    assert errors + results >= places_in_the_source(SAYS) + places_in_the_source(MAKES) > 40
