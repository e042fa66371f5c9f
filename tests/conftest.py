"""Tests that need torch and transformers are left out where those are not installed; the table of `test_matrix.py`."""

from importlib.util import find_spec
from pathlib import Path

collect_ignore_glob = []
if find_spec("torch") is None or find_spec("transformers") is None:
    collect_ignore_glob = [
        "test_cache_*.py",
        "test_agreement.py",
        "test_handle.py",
        "test_hook.py",
        "test_matrix.py",
        "test_store.py",
    ]


def pytest_addoption(parser):
    parser.addoption("--table", metavar="FILE", help="write the table of test_matrix.py between the marks in FILE")


def pytest_terminal_summary(terminalreporter, config):
    from matrix_table import Table

    table = Table.of(terminalreporter.stats)
    if len(table.rows) > 1:
        terminalreporter.write_sep("-", "families x scenarios")
        terminalreporter.write_line(table.markdown())
    if file := config.getoption("--table"):
        table.write(Path(file))
