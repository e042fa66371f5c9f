"""Rows that move, tokens that are taken back, copies."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from mixkvq import MixKVQCache, compat

from .case import Case, scenario

LENGTHS = [90, 70, 53]


def _after(case: Case, *operations: tuple[Callable[[Any], None], list[int]]) -> None:
    """Steps after operations, each of which leaves these rows."""

    def run(cache):
        reader = case.reader(cache, LENGTHS)
        reader.steps(3)
        for operation, rows in operations:
            operation(cache)
            reader.keep_rows(rows)
            reader.steps(2)
        reader.read(30)
        reader.steps(2)
        return reader.logits

    case.compare(run)


@scenario()
def reorder(case: Case) -> None:
    _after(case, (lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]))


@scenario()
def select(case: Case) -> None:
    """By a tensor, a list, a tuple and a mask."""
    _after(
        case,
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0, 1, 2])), [2, 0, 1, 2]),
        (lambda cache: cache.batch_select_indices([1, 3, 2]), [1, 3, 2]),
        (lambda cache: cache.batch_select_indices((2, 1, 0)), [2, 1, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    )


@scenario()
def repeat(case: Case) -> None:
    _after(case, (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]))


# ---- taking tokens back --------------------------------------------------------------------------------------------
def _crop(case: Case, *, recording: bool) -> None:
    """Into the window, to and into packed blocks and sinks, and then again."""

    def run(cache):
        if recording:
            cache.activate_past_recording()
        whole, logits = case.reader(cache, LENGTHS), []
        whole.steps(5)
        for depth in (1, 3, 20, 33, 50, 64, 80, 90):
            reader = whole.copy()
            reader.crop(depth)
            reader.steps(2)
            reader.read(34)
            reader.steps(1)
            reader.crop(36)
            reader.steps(1)
            logits += reader.logits
        return whole.logits + logits

    case.compare(run)


@scenario()
def crop_at_every_depth(case: Case) -> None:
    _crop(case, recording=False)


@scenario()
def crop_at_every_depth_of_a_recorded_past(case: Case) -> None:
    _crop(case, recording=True)


@scenario()
def rollback_after_every_call(case: Case) -> None:
    """As assisted generation does, which says so before there is a layer."""

    def run(cache):
        cache.activate_past_recording()
        reader = case.reader(cache, [90])
        reader.crop(0)
        for read, back in ((6, 2), (6, 5), (1, 0), (40, 7), (6, 6), (6, 0), (6, 3)):
            reader.read(read)
            reader.crop(back)
        reader.read(5)
        reader.crop(0)
        return reader.logits

    case.compare(run)


@scenario()
def rollback_expected_after_the_prompt(case: Case) -> None:
    def run(cache):
        reader = case.reader(cache, [90])
        cache.activate_past_recording()
        reader.read(6)
        reader.crop(4)
        reader.read(33)
        reader.steps(3)
        return reader.logits

    case.compare(run)


def _reset(case: Case, lengths: list[int]) -> None:
    """Ours is as a new cache; the stock one keeps zeros (before 5.18) or the number of rows (of linear states)."""

    def run(cache):
        first = case.generate(case.inputs([60, 45]), cache, 5)
        if isinstance(case.ours(cache), MixKVQCache) or case.family.encoder:
            cache.reset()
            assert cache.get_seq_length() == 0
        else:
            cache = case.stock()
        return [first, case.generate(case.inputs(lengths, seed=8), cache, 12)]

    case.compare(run, books=False)


@scenario()
def reset_and_reuse(case: Case) -> None:
    _reset(case, [70, 52])


@scenario()
def reset_and_reuse_with_more_rows(case: Case) -> None:
    _reset(case, [70, 52, 33])


# ---- copies --------------------------------------------------------------------------------------------------------
def _copied(case: Case, how: Callable[[Any], Any]) -> None:
    """A copy and its original go on, one after the other."""

    def run(cache):
        reader = case.reader(cache, LENGTHS)
        reader.steps(2)
        other = reader.copy(how)
        other.read(33)
        other.steps(2)
        reader.steps(2)
        return reader.logits + other.logits

    case.compare(run)


@scenario()
def deep_copies(case: Case) -> None:
    _copied(case, copy.deepcopy)


@scenario()
def pickles(case: Case) -> None:
    _copied(case, lambda cache: pickle.loads(pickle.dumps(cache)))


@scenario()
def saved_and_loaded(case: Case) -> None:
    """The model is checked in the first attention call, if that is seen."""

    def loaded(cache):
        if isinstance(cache, EncoderDecoderCache):
            both = EncoderDecoderCache(loaded(cache.self_attention_cache), copy.deepcopy(cache.cross_attention_cache))
            both.is_updated = dict(cache.is_updated)
            return both
        if not isinstance(cache, MixKVQCache):
            return copy.deepcopy(cache)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cache.safetensors"
            try:
                cache.save(file)
            except ValueError as error:
                if "cache_utils can be saved" in str(error):
                    pytest.skip("layers of the model's own cannot be saved")
                raise
            seen = case.family.hooked <= compat.VERSION and "dequantized" not in case.family.paths(case.attention)
            other = MixKVQCache.load(file, None if seen else case.model.config)
            MixKVQCache.load(file).save(file.with_suffix(".again"))
            assert file.read_bytes() == file.with_suffix(".again").read_bytes()
        assert [layer.true_bits for layer in other.report().layers] == [b.true_bits for b in cache.report().layers]
        return other

    _copied(case, loaded)


@scenario()
def forks(case: Case) -> None:
    def forked(cache):
        if isinstance(cache, EncoderDecoderCache):
            both = copy.deepcopy(cache)
            both.self_attention_cache = forked(cache.self_attention_cache)
            return both
        return cache.fork(2)[1] if isinstance(cache, MixKVQCache) else copy.deepcopy(cache)

    _copied(case, forked)


@scenario()
def data_parallel_gathering(case: Case) -> None:
    """Iterating gives keys and values, from which DataParallel makes another cache of the same class."""

    def gathered(cache):
        if isinstance(cache, EncoderDecoderCache):
            return EncoderDecoderCache(gathered(cache.self_attention_cache), gathered(cache.cross_attention_cache))
        if type(cache) is DynamicCache:
            return DynamicCache(iter(cache))
        return MixKVQCache(cache.mixkvq_config, ddp_cache_data=iter(cache), precision=cache.precision)

    _copied(case, gathered)
