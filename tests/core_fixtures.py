"""The fixture `isa`: run a test once per instruction set of the C core."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", params=["scalar", "avx2"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the instruction set in use during the test; skips what this CPU cannot run."""
    core = pytest.importorskip("mixkvq._core", reason="the C core is not built")
    if not dict(core.isas()).get(request.param, False):
        pytest.skip(f"{request.param} is not supported here")
    core.set_isa(request.param)
    assert core.isa() == request.param
    yield request.param
    core.set_isa(None)
