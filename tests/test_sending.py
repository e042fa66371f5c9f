"""Caches on their way to other processes: copies, however they get there; sender and receiver go on undisturbed."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from models import forward, paths, prompts
from other_process import MODEL, TOKEN, steps, worked

import mixkvq
from mixkvq import MixKVQCache
from mixkvq.guard import ANOTHER_THREAD
from mixkvq.layer import MixKVQLayer

IDS = prompts([300])["input_ids"]


class OwnCache(MixKVQCache):
    """A user's."""


def filled(make=MixKVQCache):
    cache = make()
    forward(MODEL, cache, IDS)
    forward(MODEL, cache, TOKEN)
    return cache


def sent(thing):
    """Through the pickler of queues, pools and executors."""
    return pickle.loads(bytes(ForkingPickler.dumps(thing)))


def tensors_of(cache):
    return [tensor for layer in cache.layers for tensor in layer.tensors()]


@pytest.mark.parametrize(
    "parcel",
    [
        lambda cache: cache,
        lambda cache: {"caches": [cache, cache]},
        lambda cache: cache.layers[1],
        lambda cache: cache.layers[1].store,
        lambda cache: cache.layers[1].store.records,
        lambda cache: cache.layers[1].queries,
    ],
    ids=["cache", "container", "layer", "store", "records", "queries"],
)
@pytest.mark.parametrize("make", [MixKVQCache, OwnCache, lambda: MixKVQCache(config=MODEL.config)])
def test_what_is_sent_leaves_the_senders_memory_alone(make, parcel):
    cache = filled(make)
    reference, before = copy.deepcopy(cache), [t.data_ptr() for t in tensors_of(cache)]
    ForkingPickler.dumps(parcel(cache))
    assert [t.data_ptr() for t in tensors_of(cache)] == before
    assert not any(t.is_shared() for t in tensors_of(cache))
    assert torch.equal(steps(cache), steps(reference))


@pytest.mark.parametrize(
    "make",
    [MixKVQCache, lambda: MixKVQCache("lossless"), lambda: MixKVQCache(allocate="layer")],
    ids=["default", "lossless", "layer"],
)
def test_sender_and_receiver_go_on_alone(make):
    cache = filled(make)
    reference = copy.deepcopy(cache)
    first, twin = sent([cache, cache])
    assert first is twin and type(first) is MixKVQCache
    here, there = [], []
    for step in range(140):  # over a packing step, in turns
        here.append(forward(MODEL, cache, TOKEN + step % 7))
        there.append(forward(MODEL, first, TOKEN + step % 5))
    assert torch.equal(torch.cat(here), torch.cat([forward(MODEL, reference, TOKEN + n % 7) for n in range(140)]))
    again = filled(make)
    assert torch.equal(torch.cat(there), torch.cat([forward(MODEL, again, TOKEN + n % 5) for n in range(140)]))


def test_layers_in_full_precision_and_handles_are_copies_too():
    cache = MixKVQCache()
    forward(MODEL, cache, IDS[:, :20])
    other = sent(cache)
    assert not any(t.is_shared() for t in [*tensors_of(cache), *tensors_of(other)])
    packed = filled()
    keys = sent(packed.layers[0].keys)
    assert torch.equal(keys + 0, packed.layers[0].keys + 0)
    assert not any(t.is_shared() for t in tensors_of(packed))
    tensor = torch.zeros(3)
    ForkingPickler.dumps(tensor)
    assert tensor.is_shared(), "torch does as ever with other tensors"


def test_beside_a_pass_of_another_thread_nothing_is_sent():
    cache, reference = filled(), filled()
    went = []

    def update(layer, *args, **kwargs):
        if layer.index == 1 and not went:
            went.append(threading.Thread(target=lambda: went.append(_refusal(cache))))
            went[0].start()
            went[0].join()
        return original(layer, *args, **kwargs)

    original = MixKVQLayer.extend
    MixKVQLayer.extend = update
    try:
        logits = forward(MODEL, cache, TOKEN)
    finally:
        MixKVQLayer.extend = original
    assert ANOTHER_THREAD.split(":")[0] in went[1]
    assert torch.equal(logits, forward(MODEL, reference, TOKEN))
    assert torch.equal(steps(sent(cache)), steps(reference))


def _refusal(cache):
    try:
        ForkingPickler.dumps(cache)
    except RuntimeError as error:
        return str(error)
    return "sent"


def test_a_process_made_by_spawn_goes_on_and_sends_back():
    cache = filled()
    reference = copy.deepcopy(cache)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        first = pool.submit(worked, cache, 3).result()
        here = steps(cache)
        second = pool.submit(worked, first[-1], 0).result()
    assert torch.equal(here, steps(copy.deepcopy(reference)))
    assert torch.equal(first[1], steps(reference, 3))
    assert first[0] == 301 and second[0] == 304
    assert set(first[2]) == {"packed"} and first[3] == 0, "the hook is there"
    assert torch.equal(steps(second[-1]), steps(reference))


def test_unpickling_puts_the_hook_in_place():
    cache = filled()
    text = pickle.dumps(cache)
    mixkvq.uninstall()
    try:
        other = pickle.loads(text)
        assert torch.equal(steps(other), steps(filled()))
        assert set(paths(other)) == {"packed"}
    finally:
        mixkvq.install()
