"""Every family x every scenario: ``make matrix`` runs all of it and prints the table of docs/models.md."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import models
import pytest
import torch
from families import DECODED, FAMILIES, NATIVE
from scenarios import SCENARIOS, Case, judging

SAMPLE = {"llama", "gemma2", "qwen3_next", "bloom"}
"""Families of the default test run."""
SECOND = {
    "attention_weights_and_hidden_states",
    "beams",
    "crop_at_every_depth",
    "dead_rows",
    "gradients_after_packing",
    "greedy",
    "own_additive_masks",
    "own_bool_masks",
    "padded_rows_are_as_alone_default",
    "pieces_of_every_size",
    "prefill_in_chunks_of_33",
    "reorder",
    "right_padding_and_holes",
    "rollback_after_every_call",
}
"""Scenarios for all attention implementations of a family; the others do not depend on it and are for its first one."""


def cases():
    for name, scenario in SCENARIOS.items():
        for family in FAMILIES.values():
            if scenario.families is not None and family.name not in scenario.families:
                continue
            for attention in family.attention if name in SECOND else family.attention[:1]:
                small = family.name in SAMPLE and attention == family.attention[0] and not scenario.slow
                marks = () if small else (pytest.mark.slow, pytest.mark.matrix)
                yield pytest.param(family, attention, name, marks=marks, id=f"{family.name}-{attention}-{name}")


@pytest.mark.parametrize("family, attention, scenario", list(cases()))
def test_same_as_the_stock_cache(family, attention, scenario, record_property):
    record_property("family", family.name)
    record_property("attention", attention)
    if SCENARIOS[scenario].families is not None:
        record_property("sample", scenario)
    if reason := family.absent(attention):
        pytest.skip(reason)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dequantized layers say so
        case = Case(family, attention)
        try:
            SCENARIOS[scenario](case)
        finally:
            if scenario == "greedy" and case.seen:
                record_property("path", case.seen)


def test_the_path_that_is_recorded_is_the_one_seen():
    family, recorded = replace(FAMILIES["llama"], layers=(DECODED, DECODED)), {}
    with pytest.raises(AssertionError):
        test_same_as_the_stock_cache(family, "sdpa", "greedy", recorded.__setitem__)
    assert recorded == {"family": "llama", "attention": "sdpa", "path": "packed packed"}


def test_an_error_of_the_stock_cache_is_told_in_few_words():
    case = Case(FAMILIES["mamba"], "eager")
    said = case._shortened
    assert said(AttributeError("'MambaCausalLMOutput' object\nand more")) == "AttributeError: 'CausalLMOutput' object"
    assert said(TypeError(f"{case.model} takes\nno")) == "TypeError: this model(...) takes"
    assert said(ValueError("word " * 50)).endswith("word ...") and len(said(ValueError("word " * 50))) <= 100


def test_layers_that_were_decoded_for_comparison_report_it():
    case = Case(FAMILIES["gemma3"], "sdpa")
    cache = case.quantized()
    case.reader(cache, [90, 53])
    reasons = [layer.reason for layer in cache.report().layers]
    with pytest.warns(UserWarning, match="decoded for comparison"):
        judging.decode(cache)
    layers = cache.report().layers
    assert [layer.path for layer in layers] == [NATIVE, NATIVE]
    assert [layer.reason for layer in layers] == [reasons[0], judging.COMPARED.what]
    assert layers[1].remedy == "nothing to do" and "decoded for comparison -> nothing to do" in str(cache.report())


BFLOAT16 = [
    ("llama", "sdpa"),
    ("qwen2", "eager"),
    ("gemma3", "sdpa"),
    ("gpt_oss", "eager"),
    ("qwen3_next", "sdpa"),
    ("bart", "sdpa"),
]


@pytest.mark.parametrize("name, attention", BFLOAT16)
def test_bfloat16(name, attention):
    """Prompts give the same bits; later tokens are as near to the truth (the same in float32) as with the stock cache.

    Records hold bfloat16 exactly, but the kernel rounds elsewhere on the way. Two right ways to round: the errors of 24
    steps are alike in size (0.99 to 1.05 times was seen), not in detail, so that tokens cannot be compared.
    """
    family = FAMILIES[name]
    if reason := family.absent(attention):
        pytest.skip(reason)
    case = Case(family, attention, torch.bfloat16)

    def logits(cache, model=None):
        reader = case.reader(cache)
        for tokens in (90, *[1] * 12):
            reader.read(tokens, model=model)
        return reader.logits[0].float(), torch.cat(reader.logits[1:]).float()

    lossless = case.lossless()
    (prompt, tokens), (stock_prompt, stock_tokens) = logits(lossless), logits(case.stock())
    true_tokens = logits(case.stock(), copy.deepcopy(case.model).float())[1]
    assert tuple(models.paths(case.ours(lossless))) == family.paths(attention)
    assert torch.equal(prompt, stock_prompt)
    assert float((tokens - true_tokens).norm()) < 1.25 * float((stock_tokens - true_tokens).norm())
