"""The fixture `isa`: run a test once per instruction set that the C core was built with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from mixkvq import _core
except ModuleNotFoundError:  # the C core is not built: each such test is skipped
    LEVELS = {"core": False}
else:
    LEVELS = dict(_core.isas())


@pytest.fixture(scope="session", params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the instruction set in use during the test; skips what this CPU cannot run."""
    core = pytest.importorskip("mixkvq._core", reason="the C core is not built")
    if not LEVELS[request.param]:
        pytest.skip(f"{request.param} is not supported here")
    before = core.isa()
    core.set_isa(request.param)
    assert core.isa() == request.param
    yield request.param
    core.set_isa(before)
