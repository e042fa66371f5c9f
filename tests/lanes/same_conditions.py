"""pytest plugin for both runs of transformers' own tests: the same random numbers in every test, and a record.

transformers' tests draw models and inputs from unseeded generators. Here every test begins with the same seed in every
run, so that an outcome that changes was changed by the cache.

``--testing-utils FILE`` is the checkout's ``transformers/testing_utils.py``: what it defines and the transformers that
is imported lacks is taken from there, since tests of one release ask for helpers of that release.

``--outcomes FILE`` receives what became of each test and each subtest, as JSON: "passed", "failed" or "skipped", and
the first line of what it said.

The test mixins of subjects that are not judged (`LEFT_OUT`) are empty classes: they need more than others of a release.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import testing_utils

outcomes: dict[str, tuple[str, str]] = {}
LEFT_OUT = ("fsdp", "tensor_parallel", "expert_parallel", "pipeline")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--testing-utils", type=Path, help="definitions for transformers.testing_utils to be filled from")
    parser.addoption("--outcomes", type=Path, help="where to write the outcomes, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    source = config.getoption("--testing-utils")
    if source is not None:
        fill(testing_utils, source)
    for subject in LEFT_OUT:
        module: Any = ModuleType(f"tests.test_{subject}_mixin")
        module.__getattr__ = lambda name: type(name, (), {})
        sys.modules[module.__name__] = module


def pytest_report_header() -> str:
    return f"transformers: {transformers.__version__} from {Path(transformers.__file__).parent}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    seed(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    test = report.nodeid.partition("::")[2]
    part = getattr(report, "context", None)  # of a subtest
    if part is not None:
        test += f" {part.msg or ''}{dict(part.kwargs) or ''}"
    elif report.passed and report.when != "call":
        return
    if outcomes.get(test, ("",))[0] != "failed":
        outcomes[test] = report.outcome, said(report)


def said(report: Any) -> str:
    """First line of why a test failed or was skipped."""
    if report.passed:
        return ""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else crash.message if crash else report.longreprtext
    return str(text).partition("\n")[0]


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.getoption("--outcomes") is not None:
        config.getoption("--outcomes").write_text(json.dumps(outcomes))


def seed(number: int) -> None:
    """Seed all generators that transformers' tests draw from: also those that are called ``global_rng``."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    for module in list(sys.modules.values()):
        generator = vars(module).get("global_rng") if hasattr(module, "__dict__") else None
        if isinstance(generator, random.Random):
            generator.seed(number)


def fill(module: Any, source: Path) -> list[str]:
    """Define in a module what a source file defines at its top level and the module lacks; the names."""
    missing = [node for node in ast.parse(source.read_text()).body if lacks(module, node)]
    exec(compile(ast.Module(missing, []), str(source), "exec"), vars(module))
    return sorted(name for node in missing for name in defined(node))


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def lacks(module: Any, node: ast.stmt) -> bool:
    """Whether a statement defines something that a module does not have."""
    names = defined(node)
    return bool(names) and not any(hasattr(module, name) for name in names)
