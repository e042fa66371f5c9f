"""The fixture `isa`: run a test once per instruction set that the C core was built with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

try:
    from mixkvq import _core
except ModuleNotFoundError:  # the C core is not built: each such test is skipped
    LEVELS = {"core": False}
else:
    LEVELS = dict(_core.isas())


@pytest.fixture(scope="session", params=LEVELS)
def isa(request: pytest.FixtureRequest) -> str:
    """Name of the instruction set in use during the test; skips what this CPU cannot run."""
    core = pytest.importorskip("mixkvq._core", reason="the C core is not built")
    if not LEVELS[request.param]:
        pytest.skip(f"{request.param} is not supported here")
    assert core.isa() == request.param
    return str(request.param)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[Any]:
    """Choose it for that test alone: a fixture of the session would be torn down only when another level is wanted."""
    level = getattr(item, "callspec", None) and item.callspec.params.get("isa")  # type: ignore[attr-defined]
    if level is None or not LEVELS.get(level):
        return (yield)
    before = _core.isa()
    _core.set_isa(level)
    try:
        return (yield)
    finally:
        _core.set_isa(before)
