"""What is left after an error, and devices that are not as expected, on the way of CUDA tensors."""

from __future__ import annotations

import pickle
import weakref

import one_layer
import pytest
import torch
from models import paths
from one_layer import Layer
from test_operators import cache
from test_ops import case, needs_torch_module
from test_store import begin, grow, records, states
from torch._subclasses.fake_tensor import FakeTensorMode

from mixkvq import masks, operators, ops, slabs, torch_module
from mixkvq.config import MixKVQConfig
from mixkvq.states import obstacle

pytestmark = needs_torch_module


@pytest.fixture
def rehearsal(monkeypatch):
    """CPU tensors go the way that CUDA tensors go."""
    monkeypatch.setattr(operators, "rehearsing", True)


# ---- no memory -----------------------------------------------------------------------------------------------------
def failing(monkeypatch, owner, name, at):
    """The call number ``at`` raises; so do those after it."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) >= at:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def same(store, want):
    assert [records(store, row) for row in range(2)] == [records(want, row) for row in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(store.read(), want.read(), strict=True))
    assert (store.length, store.raised, store._room) == (want.length, want.raised, want._room)


@pytest.mark.parametrize("rehearsing", [False, True])
@pytest.mark.parametrize("owner, name, at", [(ops, "pack", 2), (slabs.RecordTable, "_memory", 2)])
def test_without_memory_to_pack_nothing_is_packed(monkeypatch, rehearsing, owner, name, at):
    """Blocks packed before the error are still in the window: in both places they would be twice in the text."""
    monkeypatch.setattr(operators, "rehearsing", rehearsing)
    monkeypatch.setattr("mixkvq.store.SLAB_COLUMNS", 1)
    store, want = (begin("default", *states(2, 400)) for _ in range(2))
    new = states(2, 300, seed=5)
    for one in (store, want):
        one.append(*new)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        failing(patch, owner, name, at)
        store.flush()
    same(store, want)
    assert store.flush() and want.flush()
    same(store, want)


@pytest.mark.parametrize("at", [1, 2])
def test_without_memory_for_larger_buffers_there_is_no_room(monkeypatch, rehearsal, at):
    """A kernel on a device does not look how long a buffer is."""
    store, want = (begin("default", *states(2, 140)) for _ in range(2))
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        failing(patch, torch.Tensor, "new_zeros", at)
        store.append(*states(2, 200, seed=5))
    same(store, want)
    assert store._room == store.k.shape[2] - int(store.exact.max())
    for one in (store, want):
        one.append(*states(2, 200, seed=5))
        one.flush()
    same(store, want)


def test_without_memory_to_gather_rows_stay(monkeypatch, rehearsal):
    store, want = (begin("default", *states(2, 400)) for _ in range(2))
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        failing(patch, torch.Tensor, "index_select", 2)
        store.gather(torch.tensor([1, 0, 1]))
    same(store, want)


def test_without_memory_to_rewrite_slabs_they_stay(monkeypatch, rehearsal):
    store, want = (begin("default", *states(3, 400)) for _ in range(2))
    with monkeypatch.context() as patch:
        failing(patch, slabs.RecordTable, "_memory", 1)
        store.gather(torch.tensor([1]))
    want.gather(torch.tensor([1]))
    assert records(store, 0) == records(want, 0)
    assert all(torch.equal(a, b) for a, b in zip(store.read(), want.read(), strict=True))
    assert sum(s.numel() for s in store.records.slabs) == 3 * sum(s.numel() for s in want.records.slabs)


@pytest.mark.parametrize("tokens", [20, 200])
def test_without_memory_an_update_adds_no_tokens(monkeypatch, rehearsal, tokens):
    one, other = Layer(cache()), Layer(cache())
    for layer in (one, other):
        layer.step(tokens)
    assert paths(one.cache) == ["packed" if tokens > 100 else "native"]
    k, v = torch.randn(2, 1, one_layer.HEADS, 300, one_layer.DIM)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        failing(patch, torch, "cat", 1)
        failing(patch, torch.Tensor, "new_zeros", 1)
        one.cache.update(k, v, 0)
    assert one.cache.get_seq_length() == tokens
    assert all(torch.equal(a, b) for a, b in zip(one.step(1), other.step(1), strict=True))


# ---- devices -------------------------------------------------------------------------------------------------------
def test_a_device_that_is_too_old_says_so(monkeypatch):
    monkeypatch.setattr(torch_module, "CUDA_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with FakeTensorMode():
        key = torch.empty(1, 2, 9, 32, device="cuda")
        reason = obstacle(MixKVQConfig.preset("default"), key, key)
    assert reason.what == "no packed kernels for cuda:0: it is of compute capability 7.5, the kernels need 8.0"
    assert reason.remedy == "run the model on the CPU, or on a newer GPU"


def test_unpickled_on_another_device_records_are_there_too(rehearsal):
    """torch.load(map_location=...) moves tensors, and what says where they are stays."""
    store = begin("default", *states(2, 400))
    store.records.device = torch.device("cuda", 0)
    other = pickle.loads(pickle.dumps(store))
    assert other.records.device == torch.device("cpu")
    grow(other, *states(2, 200, seed=1), 0, 50)
    assert len(other.record(0, 0, 2)) > 0


def test_a_workspace_stays_while_a_graph_may_use_it(monkeypatch, rehearsal):
    c, capturing = case(), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    handle = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu)
    with FakeTensorMode():
        device = torch.device("cuda", 0)
        t = handle.tensors
        moved = {name: torch.empty(getattr(t, name).shape, device=device) for name in ("place", "blocks", "k")}
        handle.tensors = t._replace(**moved)
        queries_of = [torch.empty(2, 4, n, 32, device=device) for n in range(1, 20)]
        capturing = True
        assert handle.workspace(queries_of[0], 0) is None, "its zeros would be a part of the graph"
        capturing = False
        seen = weakref.ref(handle.workspace(queries_of[0], 0))
        capturing = True
        assert handle.workspace(queries_of[0], 0) is seen()
        capturing = False
        for q in queries_of[1:]:
            dropped = weakref.ref(handle.workspace(q, 0))
    assert seen() is not None and dropped() is not None and len(handle.workspaces.tensors()) == 8


def test_what_a_mask_says_is_asked_again_where_changes_are_not_counted(rehearsal):
    with torch.inference_mode():
        mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
        assert masks.first_columns(mask, 1, 5).tolist() == [0]
        mask[..., :2] = False
        assert masks.first_columns(mask, 1, 5).tolist() == [2]
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert masks.first_columns(mask, 1, 5).tolist() == [0]
    mask[..., :3] = False
    assert masks.first_columns(mask, 1, 5).tolist() == [3]
