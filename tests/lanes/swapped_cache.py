"""pytest plugin: every `DynamicCache` that transformers or its tests make is a lossless `MixKVQCache`.

``DynamicCache.__new__`` is replaced, nothing else. It makes a `SwappedCache`, which is a `MixKVQCache`, hence a
`DynamicCache`: Python then calls the ``__init__`` of the object's own class with the same arguments. So it does not
matter by which name or from which module the class was imported, before or after; ``isinstance(x, DynamicCache)`` holds
as ever, and subclasses of `DynamicCache` make themselves. What stays a plain `DynamicCache` is counted: one that
offloads, which a `MixKVQCache` refuses, and one that mixkvq itself asks for a model's layout.

Blocks of 2 tokens behind 1 sink token and a window of 4 make the tests' 7-token prompts pack.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers.cache_utils import DynamicCache

import mixkvq
from mixkvq import MixKVQCache
from mixkvq.layer import NATIVE, MixKVQLayer

SHORT = {"sink_length": 1, "residual_length": 4, "block_length": 2}
_NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]?\d+)?")

made: list[SwappedCache] = []
"""Caches of the test that runs."""

totals: dict[str, Counter[str]] = {"caches": Counter(), "layers": Counter(), "reasons": Counter()}


class SwappedCache(MixKVQCache):
    """A `MixKVQCache` with the constructor of `DynamicCache`."""

    def __init__(self, ddp_cache_data: Iterable[Any] | None = None, config: Any = None, **never_offloads: Any) -> None:
        super().__init__("lossless", ddp_cache_data=ddp_cache_data, config=config, **SHORT)
        made.append(self)


def new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``DynamicCache.__new__``."""
    caller = sys._getframe(1).f_globals.get("__name__", "")
    offloads = kwargs.get("offloading") or (len(args) > 2 and args[2])
    if cls is not DynamicCache or caller.startswith("mixkvq."):
        return object.__new__(cls)
    totals["caches"]["offloading, left as they are" if offloads else "swapped"] += 1
    return object.__new__(cls if offloads else SwappedCache)


def count(cache: MixKVQCache) -> None:
    """Add the layers of a cache to the totals."""
    for layer, held in zip(cache.report().layers, cache.layers, strict=True):
        path = "transformers' own" if not isinstance(held, MixKVQLayer) else layer.path.replace(NATIVE, "not packed")
        totals["layers"][path] += 1
        totals["reasons"][f"{path}: {_NUMBER.sub('#', layer.reason)}"] += 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--swap-report", type=Path, help="where to write what was swapped, as JSON")


def pytest_configure() -> None:
    DynamicCache.__new__ = staticmethod(new)  # type: ignore[method-assign, assignment]


def pytest_report_header() -> str:
    return f"DynamicCache: MixKVQCache('lossless', {SHORT}) of mixkvq in {Path(mixkvq.__file__).parent}"


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    for cache in made:
        count(cache)
    made.clear()


def pytest_unconfigure(config: pytest.Config) -> None:
    del DynamicCache.__new__
    report = config.getoption("--swap-report")
    if report is not None:
        report.write_text(json.dumps(totals))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_sep("=", "swapped caches")
    for title, counts in totals.items():
        terminalreporter.write_line(f"{title}: {dict(counts)}")
