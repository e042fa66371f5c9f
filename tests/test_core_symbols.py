"""What the compiled core refers to and keeps: no allocator, no output, no way out of the process, one global."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [*sorted((ROOT / "csrc").glob("*.c")), *sorted((ROOT / "csrc/cpu").glob("*.c"))]
OBJECTS = ROOT / "build/objects/mixkvq._core"
pytestmark = pytest.mark.skipif(not SOURCES, reason="the tests lie apart from the sources")

FROM_C = {"memcpy", "memset", "memmove", "memcmp", "strcmp", "expf", "tanhf"}
"""Functions of C's library that the core may call: none allocates, prints, or ends the process."""
FROM_COMPILER = {
    "_GLOBAL_OFFSET_TABLE_",
    "__cpu_features2",
    "__cpu_indicator_init",
    "__cpu_model",
    "__popcountdi2",
    "getauxval",
}
"""Which instructions the CPU has, how many bits are set."""
FORBIDDEN = (
    r"\b(\w*alloca?|free|strdup|\w*printf|f?put[cs]|perror|abort|_?exit|assert|\w*longjmp|raise|signal|getenv)\s*\("
)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of every file of the core that this machine compiles: those of the last build, or made now."""
    texts = [path for path in (ROOT / "csrc").rglob("*.*") if path.suffix in (".c", ".h")]
    newest, made = max(path.stat().st_mtime for path in texts), [*OBJECTS.glob("*.o")]
    if made and min(path.stat().st_mtime for path in made) >= newest:
        found = [OBJECTS / f"{source.stem}.o" for source in SOURCES]
        return [path for path in found if path.exists()]
    if not (compiler := shutil.which("cc")):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("core")
    for source in SOURCES:
        if source.stem.startswith("kernels_") and source.stem != "kernels_scalar":
            continue  # the same bodies over vectors
        command = [compiler, "-std=c11", "-fPIC", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        subprocess.run(command, check=True)
    return sorted(folder.glob("*.o"))


def symbols(path: Path, *options: str) -> list[list[str]]:
    """Of an object, the columns of nm."""
    if not shutil.which("nm"):
        pytest.skip("needs nm of binutils")
    listing = subprocess.run(["nm", *options, str(path)], check=True, capture_output=True, text=True).stdout
    return [[column.strip() for column in line.split("|")] for line in listing.splitlines() if "|" in line]


def test_the_core_calls_nothing_that_allocates_prints_or_ends_the_process(objects):
    assert {"append", "check", "dispatch", "kernels_scalar", "plan", "status"} <= {path.stem for path in objects}
    called = {row[0] for path in objects for row in symbols(path, "--format=sysv", "--undefined-only")}
    assert any(name.startswith("mkvq_") for name in called) and "memcpy" in called, "nm was understood"
    assert {name for name in called if not name.startswith("mkvq_")} <= FROM_C | FROM_COMPILER


def test_the_core_keeps_the_chosen_kernels_and_nothing_else(objects):
    """No other variable outlives a call: calls of several threads meet nowhere."""
    writable = {
        (path.stem, row[0])
        for path in objects
        for row in symbols(path, "--format=sysv", "--defined-only")
        if row[-1] == "*COM*" or re.fullmatch(r"\.(data|bss|tdata|tbss)(\.(?!rel\.ro).*)?", row[-1])
    }
    assert writable == {("dispatch", "chosen")}


def test_no_text_of_the_core_names_such_a_function():
    """Also what this machine does not compile."""
    texts = [path for folder in ("", "cpu", "cuda") for path in (ROOT / "csrc" / folder).glob("*.*")]
    found = {}
    for path in texts:
        if path.name.startswith("emulate"):
            continue  # the GPU that tests have in the place of one
        code = re.sub(r"/\*.*?\*/|//[^\n]*|\"(\\.|[^\"\\])*\"", " ", path.read_text(), flags=re.DOTALL)
        if match := re.search(FORBIDDEN, code):
            found[path.name] = match[0]
    assert len(texts) > 50 and found == {}
