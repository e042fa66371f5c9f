"""Every family x every scenario: ``make matrix`` runs all of it and prints the table of docs/models.md."""

from __future__ import annotations

import warnings

import pytest
import torch
from families import FAMILIES
from scenarios import SCENARIOS, Case

SAMPLE = {"llama", "gemma2", "qwen3_next", "bloom"}
"""Families of the default test run."""


def cases():
    for name, scenario in SCENARIOS.items():
        for family in FAMILIES.values():
            if scenario.families is not None and family.name not in scenario.families:
                continue
            for attention in family.attention:
                small = family.name in SAMPLE and attention == family.attention[0] and not scenario.slow
                marks = () if small else (pytest.mark.slow, pytest.mark.matrix)
                yield pytest.param(family, attention, name, marks=marks, id=f"{family.name}-{attention}-{name}")


@pytest.mark.parametrize("family, attention, scenario", list(cases()))
def test_same_as_the_stock_cache(family, attention, scenario, record_property):
    for name, value in (("family", family.name), ("attention", attention), ("path", " ".join(family.paths(attention)))):
        record_property(name, value)
    if family.absent:
        pytest.skip(family.absent)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dequantized layers say so
        SCENARIOS[scenario](Case(family, attention))
