"""The way of CUDA tensors through Python and the operators, rehearsed on CPU tensors and on fake CUDA tensors."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import pickle
import weakref

import one_layer
import pytest
import torch
from host_reads import no_host_reads
from models import forward, generate, paths, prompts, tiny
from one_layer import Layer
from test_ops import case, needs_torch_module, queries
from test_store import HEADS, begin, grow, records, states
from torch._subclasses.fake_tensor import FakeTensorMode

from mixkvq import MixKVQCache, operators, ops, proof, slabs, torch_module
from mixkvq.config import MixKVQConfig
from mixkvq.placement import Workspaces
from mixkvq.queries import QueryStatistics
from mixkvq.states import obstacle
from mixkvq.store import columns_at_once

pytestmark = needs_torch_module
DIM = 32


@pytest.fixture
def rehearsal(monkeypatch):
    """CPU tensors go the way that CUDA tensors go."""
    monkeypatch.setattr(operators, "rehearsing", True)


def cache(preset: str = "default", **options) -> MixKVQCache:
    return MixKVQCache(preset, block_length=32, residual_length=32, key_group_size=32, **options)


# ---- ops -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("capacity", [0, 9])
def test_a_handle_over_addresses_attends_as_one_over_slabs(rehearsal, monkeypatch, capacity):
    c, q = case(), queries(3)
    total = torch.zeros(2, 2, 32, dtype=torch.float64)
    window = (*c.window, c.exact, None, 2)
    history = ([c.staging.view(-1)], c.place, c.blocks, c.mu, (total, 2))
    there = ops.layer(*window, *history, capacity=capacity)
    assert type(there) is operators.DeviceLayer and there.tensors.place.shape[2] == max(capacity, 2)
    assert there.tensors.block_tokens == 64 and there.tensors.record_bytes == int(c.sizes.max())
    assert int(there.tensors.place[1, 0, 1]) == 0, "row 1 has one block"
    monkeypatch.setattr(operators, "rehearsing", False)
    here = ops.layer(*window, *history)
    for options in ({"causal": True}, {"mask": torch.rand(1, 1, 3, 140) < 0.5}, {"softcap": 5.0, "precision": "exact"}):
        assert torch.equal(ops.attend(there, q, **options), ops.attend(here, q, **options))
    seen = [torch.zeros_like(total) for _ in range(2)]
    for handle in (there, here):
        total.zero_()
        ops.attend(handle, q, observe=True)
        seen.append(total.clone())
    assert torch.equal(seen[2], seen[3]) and bool(seen[2].any())
    decoded = [torch.zeros(2, 2, 140, 32) for _ in range(4)]
    ops.unpack(there, *decoded[:2], c.first)
    ops.unpack(here, *decoded[2:], c.first)
    assert torch.equal(decoded[0], decoded[2]) and torch.equal(decoded[1], decoded[3])
    ops.append(there, q[:, :2], q[:, 2:])
    assert c.exact.tolist() == [13, 10] and torch.equal(c.window[0][0, :, 10:13], q[0, :2])


def test_what_changes_in_the_tensors_of_a_handle_is_seen(rehearsal):
    """As a CUDA graph sees it, which has their addresses."""
    c, q = case(), queries(2)
    handle = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu, capacity=5)
    t = handle.tensors
    full = ops.attend(handle, q)
    c.blocks.sub_(1)
    fewer = ops.attend(handle, q)
    assert not torch.equal(full, fewer)
    t.place[:, :, 4], t.place[:, :, 0] = t.place[:, :, 0].clone(), 0
    c.blocks.zero_()
    none = ops.attend(handle, q)
    assert bool(none.isfinite().all()) and not torch.equal(none, fewer)
    t.place[:, :, 0] = t.place[:, :, 4]
    c.blocks.copy_(torch.tensor([1, 0]))
    assert torch.equal(ops.attend(handle, q), fewer)


def test_a_layer_that_begins_without_records(rehearsal):
    """Room for what comes: nothing is read, and blocks are seen when they are there."""
    c, q = case(), queries(2)
    none = torch.zeros(2, 2, 0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    parts = (*c.window, c.exact, None, 2, [], *none, c.mu)
    assert ops.layer(*parts).tensors.place.shape[2] == 0
    with pytest.raises(ValueError, match="capacity is 5, must be 0 for a layer without records, or block_tokens and"):
        ops.layer(*parts, capacity=5)
    with pytest.raises(ValueError, match="record_bytes is 0, must be given together with block_tokens, which is 64"):
        ops.layer(*parts, capacity=5, block_tokens=64)
    handle = ops.layer(*parts, capacity=5, block_tokens=64, record_bytes=int(c.sizes.max()))
    empty = ops.attend(handle, q)
    full = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu)
    handle.tensors.place[:, :, :2].copy_(full.tensors.place)
    handle.tensors.blocks.copy_(c.blocks)
    assert torch.equal(ops.attend(handle, q), ops.attend(full, q)) and not torch.equal(ops.attend(full, q), empty)


def test_records_of_two_lengths_in_tokens_are_refused(rehearsal):
    c = case()
    codec = dataclasses.replace(c.codec, block_length=32, key_group=32)
    short = ops.pack(codec, c.k, c.v, c.first, c.blocks, 2, None, c.mu, c.has_mu)[0]
    place = torch.stack([c.place[:, :, 0], (torch.arange(4).view(2, 2) * 2 * short.shape[-1]) + (1 << 40)], 2)
    pair = [c.staging.view(-1), short.view(-1)]
    with pytest.raises(ValueError, match="records are of 32 to 64 tokens, must all be of one length"):
        ops.layer(*c.window, c.exact, None, 2, pair, place, torch.tensor([2, 2]), c.mu)


def test_operators_want_either_slabs_or_addresses():
    c, q = case(), queries(1)
    arguments = (c.place, c.blocks, c.mu, *c.window, c.exact, None, 2, None, False, 0.2, 0.0, None, 0)
    with pytest.raises(RuntimeError, match="slabs are 1, must be none where record_bytes says"):
        torch.ops.mixkvq.attend(q, [c.staging.view(-1)], *arguments, 64, 5000)
    with pytest.raises(RuntimeError, match="block_tokens is 70000, must be from 0 to 65535"):
        torch.ops.mixkvq.attend(q, [], *arguments, 70000, 5000)
    with pytest.raises(RuntimeError, match="record_bytes is -1, must not be negative"):
        torch.ops.mixkvq.attend(q, [], *arguments, 64, -1)


def test_opcheck_with_addresses_and_workspace(rehearsal):
    c, q = case(), queries(2)
    t = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu, capacity=4).tensors
    history = ([], t.place, t.blocks, t.mu)
    shape = (t.block_tokens, t.record_bytes)
    options = (None, True, 0.2, 0.0, None, 0, *shape, torch.zeros(4096, dtype=torch.uint8))
    torch.library.opcheck(torch.ops.mixkvq.attend.default, (q, *history, *c.window, c.exact, None, 2, *options))
    k, v = torch.zeros(2, 2, 140, 32), torch.zeros(2, 2, 140, 32)
    torch.library.opcheck(torch.ops.mixkvq.unpack.default, (*history, k, v, c.first, *shape))
    assert torch.ops.mixkvq.attend_workspace(q, t.place, t.blocks, t.k, 0, *shape) == 0, "the core has its own"


def test_a_handle_over_addresses_compiles(rehearsal):
    c = case()
    handle = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu, capacity=4)
    step = torch.compile(lambda q: ops.attend(handle, 2 * q) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(queries(3)), ops.attend(handle, 2 * queries(3)) + 1)


# ---- the store -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", ["default", "compact", "lossless", "layer"])
@pytest.mark.parametrize("step", [1, 200])
def test_a_store_does_the_same_either_way(preset, step, monkeypatch):
    k, v = states(2, 700)
    q = torch.randn(2, 4, 1, DIM, generator=torch.Generator().manual_seed(2))
    found = []
    for rehearsing in (False, True):
        monkeypatch.setattr(operators, "rehearsing", rehearsing)
        store = begin(preset, k[:, :, :400], v[:, :, :400], start=[0, 129])
        grow(store, k, v, 400, step)
        outputs = [store.attend(q, observe=True)]
        store.crop(517)
        outputs += [store.attend(q), *store.read()]
        store.gather(torch.tensor([1, 0, 1]))
        grow(store, *states(3, 200, seed=3), 0, 50)
        outputs += [store.attend(q[[1, 0, 1]]), *store.read(), store.exact, store.mu]
        found.append(([records(store, row) for row in range(3)], [x for x in outputs if x is not None]))
        assert type(store.core()) is (operators.DeviceLayer if rehearsing else ops.Layer)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_the_table_of_addresses_stays_while_there_is_room(rehearsal):
    k, v = states(1, 132 + 128 * 60)
    store, seen = begin("default", k[:, :, :300], v[:, :, :300]), []
    for t in range(300, k.shape[2], 128):
        store.append(k[:, :, t : t + 128], v[:, :, t : t + 128])
        store.flush()
        place = store.core().tensors.place
        for block in (0, int(store.blocks[0]) - 1):
            address = int(place[0, 1, block])
            assert ctypes.string_at(address, 4) == b"MKVQ" and address % 64 == 0
            length = len(store.record(0, 1, block))
            assert ctypes.string_at(address, length) == store.record(0, 1, block)
        assert not place[0, :, int(store.blocks[0]) :].any()
        seen.append((place.data_ptr(), store.core().tensors.blocks.data_ptr(), place.shape[2]))
    assert len(set(seen)) == 4 and seen[0][2] == 16 and seen[-1][2] < 1.5 * 60
    assert store.core().tensors.record_bytes == len(store.record(0, 0, 0)) < store._record_bound


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_copies_have_addresses_of_their_own(rehearsal, how):
    store = begin("default", *states(2, 400))
    q = torch.randn(2, 4, 1, DIM)
    want, other = store.attend(q), how(store)
    assert torch.equal(other.attend(q), want)
    assert not torch.equal(other.core().tensors.place, store.core().tensors.place)
    assert other.placement.workspaces is not store.placement.workspaces


def test_records_of_unequal_length_are_copied_by_one_mask():
    """As on a CUDA device, where a copy for each would be many launches."""
    lengths = [192, 0, 64, 256]
    slots = torch.randint(0, 256, (4, 256), dtype=torch.uint8)

    class Elsewhere(torch.Tensor):
        is_cpu = False

    for tensor in (slots, slots.as_subclass(Elsewhere)):
        slab = torch.zeros(512, dtype=torch.uint8)
        assert slabs._copy_records(slab, tensor, lengths) == 0
        assert torch.equal(slab, torch.cat([slot[:n] for slot, n in zip(slots, lengths, strict=True)]))


# ---- memory --------------------------------------------------------------------------------------------------------
def test_workspaces_are_shared_zero_and_nobody_elses():
    spaces = Workspaces()
    first = spaces.take((1, 2), 100, torch.device("cpu"))
    assert not first.any() and spaces.take((1, 2), 50, torch.device("cpu")) is first
    assert spaces.take((1, 3), 50, torch.device("cpu")) is not first
    larger = spaces.take((1, 2), 200, torch.device("cpu"))
    assert larger.numel() == 200 and not larger.any()
    assert sum(t.numel() for t in spaces.tensors()) == 250
    assert copy.deepcopy(spaces).tensors() == []
    for n in range(20):
        spaces.take((2, n), 10, torch.device("cpu"))
    assert len(spaces.tensors()) == 8, "shapes come and go"


class Host:
    """Memory that says that it is pinned."""

    def __init__(self, monkeypatch):
        self.addresses, self.waits = set(), 0
        monkeypatch.setattr(slabs, "pinned_memory", self.take)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor.data_ptr() in self.addresses)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)

    def take(self, nbytes):
        memory = torch.empty(nbytes, dtype=torch.uint8)
        self.addresses.add(memory.data_ptr())
        return memory

    def wait(self, device):
        self.waits += 1


def test_offloaded_records_are_in_pinned_memory_and_stay_there(rehearsal, monkeypatch):
    host = Host(monkeypatch)
    store = begin("default", *states(3, 300))
    want = store.attend(torch.ones(3, 4, 1, DIM))
    store.records._readers = slabs._Readers(torch.device("cuda"))
    store.records.slabs = [store.records._copied(slab) for slab in store.records.slabs]
    store.records._fresh, store._handle = False, None
    assert torch.equal(store.attend(torch.ones(3, 4, 1, DIM)), want)
    grow(store, *states(3, 200, seed=1), 0, 50)
    for other in (store, copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert len(other.records.slabs) > 1 and all(s.data_ptr() in host.addresses for s in other.records.slabs)
        assert other.totals().host_bytes == sum(s.numel() for s in other.records.slabs)
    before = records(store, 2)
    waited = host.waits
    store.gather(torch.tensor([2]))
    assert host.waits > waited, "kernels may still read what is let go"
    assert records(store, 0) == before and all(s.data_ptr() in host.addresses for s in store.records.slabs)
    waited, gone = host.waits, list[int]()
    weakref.finalize(store.records.slabs[0], lambda: gone.append(host.waits))
    store.records = None
    assert gone == [waited + 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_offloading_needs_a_device(monkeypatch):
    with pytest.raises(ValueError, match="offload is True, must be False without kernels that read host memory: "):
        MixKVQCache(offload=True)
    monkeypatch.setattr(torch_module, "CUDA_PROBLEM", None)
    with pytest.raises(ValueError, match="offload is True, must be False where there is no CUDA device"):
        MixKVQCache(offload=True)
    with pytest.raises(TypeError, match="offload is 1, must be True or False"):
        MixKVQCache(offload=1)


# ---- models --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset, attention, lengths", [
    ("default", "sdpa", [150]), ("default", "sdpa", [150, 110]), ("lossless", "eager", [120, 90]),
    ("compact", "eager", [100]),
])  # fmt: skip
def test_a_model_generates_the_same(preset, attention, lengths, monkeypatch):
    model, inputs, found = tiny("llama", attention), prompts(lengths), []
    for rehearsing in (False, True):
        monkeypatch.setattr(operators, "rehearsing", rehearsing)
        used = cache("default" if preset == "compact" else preset)
        found.append((generate(model, inputs, used, 70), used))
    (want, first), (got, second) = found
    assert torch.equal(want.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))
    assert paths(first) == paths(second) == ["packed"] * 2
    assert all(layer.dequantizations == 0 for layer in second.layers)
    assert second.report().true_bits == first.report().true_bits


def test_saved_and_loaded_caches_and_forks_go_on(rehearsal, tmp_path):
    model, inputs = tiny("llama"), prompts([150, 110])
    used = cache()
    forward(model, used, inputs["input_ids"], inputs["attention_mask"])
    used.save(tmp_path / "cache")
    token, mask = torch.tensor([[7], [9]]), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    loaded = MixKVQCache.load(tmp_path / "cache", config=model.config)
    (fork,) = used.fork(1)
    want = forward(model, used, token, mask)
    assert torch.equal(forward(model, fork, token, mask), want)
    assert torch.equal(forward(model, loaded, token, mask), want)
    assert paths(loaded) == ["packed"] * 2


@pytest.mark.parametrize("attention, lengths", [("sdpa", [150]), ("sdpa", [150, 110]), ("eager", [150, 110])])
def test_a_decode_step_reads_nothing_on_the_host(rehearsal, monkeypatch, attention, lengths):
    """Append and attention of every layer; flushes left out."""
    model, inputs, used = tiny("llama", attention), prompts(lengths), cache()
    mask = inputs["attention_mask"]
    forward(model, used, inputs["input_ids"], mask)
    token = torch.full((len(lengths), 1), 5)
    watched = 0
    real = {"update": MixKVQCache.update, "attend": type(used.layers[0]).attend}

    def guarded(name):
        def call(owner, *args, **kwargs):
            nonlocal watched
            if not quiet:
                return real[name](owner, *args, **kwargs)
            with no_host_reads(monkeypatch) as watch:
                result = real[name](owner, *args, **kwargs)
            watched += 1
            made = [call for call in watch.calls if not call.startswith(("mixkvq::", "aten::view", "aten::detach"))]
            assert made == [], f"{name} calls {made}"
            return result

        return call

    monkeypatch.setattr(MixKVQCache, "update", guarded("update"))
    monkeypatch.setattr(type(used.layers[0]), "attend", guarded("attend"))
    for step in range(40):
        mask = torch.cat([mask, mask.new_ones(len(lengths), 1)], 1)
        quiet = step > 1 and min(layer.store._slack for layer in used.layers) > 1
        forward(model, used, token, mask)
    assert watched >= 2 * 2 * 30


def test_only_the_attention_of_another_call_is_checked_in_full(rehearsal, monkeypatch):
    """The hook itself: an agreement serves every steady step, also with a mask that hides padding."""
    model, inputs, used = tiny("llama"), prompts([150, 110]), cache()
    mask = inputs["attention_mask"]
    forward(model, used, inputs["input_ids"], mask)
    from mixkvq import hook

    checked, real = [], hook._packed_call
    monkeypatch.setattr(hook, "_packed_call", lambda call: checked.append(call) or real(call))
    for _ in range(10):
        mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
        forward(model, used, torch.full((2, 1), 5), mask)
    assert len(checked) == 2, "the first step of each layer"


def test_no_layers_plain_tensors_outlive_its_packing(rehearsal, monkeypatch):
    model, inputs, used = tiny("llama", num_hidden_layers=4), prompts([150]), cache()
    real, plain = MixKVQCache.update, []

    def update(owner, key, value, index, *args, **kwargs):
        plain.append([i for i, layer in enumerate(owner.layers) if layer._k is not None])
        return real(owner, key, value, index, *args, **kwargs)

    monkeypatch.setattr(MixKVQCache, "update", update)
    forward(model, used, inputs["input_ids"], inputs["attention_mask"])
    assert plain == [[]] * 4 and paths(used) == ["packed"] * 4


def test_staging_is_limited_by_device():
    assert columns_at_once(1 << 20) == 8 and columns_at_once(1 << 20, "cuda") == 64
    assert columns_at_once(1 << 30) == columns_at_once(1 << 30, "cuda") == 1
    assert columns_at_once(1 << 23, "cuda") == 8


# ---- fake CUDA tensors ---------------------------------------------------------------------------------------------
def to_fake_cuda(store, fresh):
    """A store on the CPU as if its tensors, records aside, were on a CUDA device."""
    device = torch.device("cuda", 0)
    for name in ("k", "v", "exact", "start", "mu", "has_mu"):
        real = getattr(store, name)
        setattr(store, name, torch.empty(real.shape, dtype=real.dtype, device=device))
    store.queries.sum = torch.empty(store.queries.sum.shape, dtype=torch.float64, device=device)
    table = torch.empty(fresh.place.shape, dtype=torch.int64, device=device)
    store.records._addresses = table, torch.empty(fresh.blocks.shape, dtype=torch.int64, device=device)
    store.records._fresh, store._handle = True, None


def test_a_step_on_a_cuda_device_asks_for_nothing_but_kernels(rehearsal, monkeypatch):
    """Fake tensors have no numbers: whatever read one would fail."""
    monkeypatch.setattr(torch_module, "CUDA_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    store = begin("default", *states(2, 300), queries=QueryStatistics("rms"))
    fresh = store.core().tensors
    with FakeTensorMode():
        to_fake_cuda(store, fresh)
        for _ in range(20):
            new = torch.empty(2, HEADS, 1, DIM, device="cuda")
            assert store.extend(new, new)
            out = store.attend(torch.empty(2, 4, 1, DIM, device="cuda"), observe=True)
            assert out.shape == (2, 1, 4, DIM) and out.device == torch.device("cuda", 0)
            assert not store.flush()


@pytest.mark.parametrize("mask", [False, True])
def test_update_and_hook_on_a_cuda_device_ask_for_nothing_but_kernels(rehearsal, monkeypatch, mask):
    monkeypatch.setattr(torch_module, "CUDA_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one = Layer(cache())
    hidden = torch.zeros(1, 1, 1, 200) if mask else None
    for _ in range(70):
        one.step(1, None if hidden is None else hidden[..., : one.cache.get_seq_length() + 1])
    layer = one.cache.layers[0]
    assert layer.mode == "packed" and layer.agreement is not None and layer.store._slack > 20
    fresh, epoch = layer.store.core().tensors, layer.epoch
    with FakeTensorMode():
        to_fake_cuda(layer.store, fresh)
        layer.device = torch.device("cuda", 0)
        layer._token = (*layer._token[:2], 0)
        states = {heads: torch.empty(1, heads, 1, one_layer.DIM, device="cuda") for heads in (2, 4)}
        for _ in range(10):
            given = one.cache.update(states[2], states[2], 0)
            assert given[0].device == torch.device("cuda", 0)
            seen = torch.empty(1, 1, 1, layer.length, device="cuda") if mask else None
            with torch.no_grad():
                function = one_layer.found(one.function)
                out = function(one_layer.Module(), states[4], *given, seen, scaling=one_layer.DIM**-0.5, dropout=0.0)[0]
            assert out.shape == (1, 1, 4, one_layer.DIM) and out.device == torch.device("cuda", 0)
    assert layer.epoch == epoch + 10 and layer.dequantizations == 0


@pytest.mark.skipif(torch_module.CUDA_PROBLEM is None, reason="there are kernels")
def test_without_kernels_a_layer_says_what_to_do():
    with FakeTensorMode():
        key = torch.empty(1, 2, 9, 32, device="cuda")
        reason = obstacle(MixKVQConfig.preset("default"), key, key)
        with pytest.raises(ValueError, match="no kernels for tensors on cuda:0: "):
            ops.salience_(torch.empty(1, 2, 32, dtype=torch.float64), key, 2, 2)
    assert reason.what == f"no packed kernels for cuda:0: {torch_module.CUDA_PROBLEM}"
    assert reason.remedy == f"run the model on the CPU, or {torch_module.CUDA_REMEDY}"


def test_kernels_make_layers_on_a_cuda_device_packable(monkeypatch):
    monkeypatch.setattr(torch_module, "CUDA_PROBLEM", None)
    with FakeTensorMode():
        key = torch.empty(1, 2, 9, 32, device="cuda")
        assert obstacle(MixKVQConfig.preset("default"), key, key) is None


@pytest.mark.parametrize("precision, rounds", [("highest", False), ("high", True)])
def test_a_proof_knows_how_torch_multiplies_on_a_cuda_device(precision, rounds):
    before = torch.get_float32_matmul_precision()
    with FakeTensorMode():
        query = torch.empty(1, 2, 1, 32, device="cuda")
        try:
            torch.set_float32_matmul_precision(precision)
            assert proof._rounds_to_tf32(query) == rounds
            assert not proof._rounds_to_tf32(torch.empty(1, 2, 1, 32, device="cuda", dtype=torch.float16))
            assert not proof._rounds_to_tf32(torch.empty(1, 2, 1, 32))
        finally:
            torch.set_float32_matmul_precision(before)


def test_sinks_in_16_bits_are_those_of_now():
    """Whoever writes to ``.data`` leaves no trace: a converted copy cannot be kept."""
    sinks = torch.nn.Parameter(torch.randn(4).bfloat16())
    assert torch.equal(proof.sink_logits(None, {"s_aux": sinks}), sinks.float())
    sinks.data.add_(1)
    assert torch.equal(proof.sink_logits(None, {"s_aux": sinks}), sinks.float())
