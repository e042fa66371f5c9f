"""Tests that need torch and transformers are left out where those are not installed; options of `test_matrix.py`."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

os.environ.pop("COLUMNS", None)  # of the terminal, or of who runs several processes: what is printed is wide enough

collect_ignore_glob = []
if find_spec("torch") is None or find_spec("transformers") is None:
    collect_ignore_glob = [
        "test_cache_*.py",
        "test_agreement.py",
        "test_faults_[!b]*.py",
        "test_handle.py",
        "test_hook.py",
        "test_gpu_cache.py",
        "test_matrix.py",
        "test_operators*.py",
        "test_parallel*.py",
        "test_saving*.py",
        "test_store.py",
    ]


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", help="write the table of test_matrix.py between the marks in FILE")
    parser.addoption("--share", metavar="N", type=int, default=1, help="of test_matrix.py, run every Nth test only")


def pytest_collection_modifyitems(config, items):
    """A share of the pairs of family and scenario; every 19th leaves out no family, and no scenario that many have."""
    pairs = [item for item in items if getattr(item, "originalname", "") == "test_same_as_the_stock_cache"]
    left_out = set(pairs) - set(pairs[:: config.getoption("--share")])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def level_as_found():
    """Tests leave the instruction set as it was: lanes run all of them on one that they choose."""
    core = sys.modules.get("mixkvq._core")
    before = core and core.isa()
    yield
    assert core is None or core.isa() == before


def pytest_terminal_summary(terminalreporter, config):
    from matrix_table import Table

    table = Table.of(terminalreporter.stats)
    if len(table.rows) > 1:
        terminalreporter.write_sep("-", "families x scenarios")
        terminalreporter.write_line(table.markdown())
    if file := config.getoption("--table"):
        table.write(Path(file))
