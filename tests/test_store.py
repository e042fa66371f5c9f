"""The packed store alone, without transformers: growing, reading, cropping, moving rows, accounts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from mixkvq import _core, reference
from mixkvq.config import MixKVQConfig
from mixkvq.queries import QueryStatistics
from mixkvq.store import PackedStore

torch.set_num_threads(1)
HEADS, DIM = 2, 32
PRESETS = ["default", "compact", "kivi-2", "lossless", "layer"]
POOLED = MixKVQConfig.preset("default", allocate="layer")  # the second head gets more columns


def config_of(preset: str, **fields) -> MixKVQConfig:
    return POOLED.replace(**fields) if preset == "layer" else MixKVQConfig.preset(preset, **fields)


def states(
    batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return (k * torch.tensor([1, 4]).view(-1, 1, 1)).to(dtype), v.to(dtype)


def begin(preset: str, k: torch.Tensor, v: torch.Tensor, start=None, queries=None, **fields) -> PackedStore:
    config = config_of(preset, **fields)
    start = torch.zeros(k.shape[0], dtype=torch.int64) if start is None else torch.tensor(start)
    return PackedStore.begin(config, config.codec(DIM, str(k.dtype).removeprefix("torch.")), k, v, start, queries)


def records(store: PackedStore, row: int) -> list[list[bytes]]:
    return [[store.record(row, head, j) for j in range(int(store.blocks[row]))] for head in range(HEADS)]


def grow(store: PackedStore, k: torch.Tensor, v: torch.Tensor, begin_at: int, step: int = 1) -> None:
    """Append and flush as a model that generates does."""
    for t in range(begin_at, k.shape[2], step):
        store.append(k[:, :, t : t + step], v[:, :, t : t + step])
        store.flush()


@pytest.mark.parametrize("tokens", [4, 131, 132, 133, 259, 260, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lossless_gives_back_every_bit(tokens, dtype):
    k, v = states(2, tokens, dtype=dtype)
    store = begin("lossless", k, v, start=[0, 3], sink_length=4)
    got_k, got_v = store.read()
    for row, start in enumerate([0, 3]):
        assert torch.equal(got_k[row, :, start:], k[row, :, start:])
        assert torch.equal(got_v[row, :, start:], v[row, :, start:])
        assert not got_k[row, :, :start].any()
    assert store.blocks.tolist() == [max((tokens - s - 4) // 128, 0) for s in (0, 3)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("step", [1, 7, 300])
def test_a_prompt_packs_to_the_same_records_as_its_tokens_one_by_one(preset, step):
    k, v = states(1, 700)
    at_once = begin(preset, k, v)
    grown = begin(preset, k[:, :, :200], v[:, :, :200])
    grow(grown, k, v, 200, step)
    assert records(grown, 0) == records(at_once, 0)
    assert torch.equal(grown.exact, at_once.exact)
    assert all(torch.equal(a, b) for a, b in zip(grown.read(), at_once.read(), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_padded_row_equals_the_same_row_alone(preset):
    k, v = states(3, 600)
    q = torch.randn(3, 4, 600, DIM, generator=torch.Generator().manual_seed(5)) * torch.logspace(-1, 1, DIM)
    start = [0, 37, 421]
    salience = config_of(preset).salience
    together = QueryStatistics(salience)
    together.add(q, HEADS, torch.tensor(start))
    batch = begin(preset, k, v, start, together)
    grow(batch, *(torch.cat(pair, 2) for pair in zip((k, v), states(3, 150, seed=9), strict=True)), 600)
    for row, at in enumerate(start):
        own = QueryStatistics(salience)
        own.add(q[row : row + 1, :, at:], HEADS, None)
        one = (slice(row, row + 1), slice(None), slice(at, None))
        alone = begin(preset, k[one], v[one], queries=own)
        rest = [torch.cat(pair, 2)[row : row + 1, :, at:] for pair in zip((k, v), states(3, 150, seed=9), strict=True)]
        grow(alone, *rest, 600 - at)
        assert int(alone.blocks[0]) >= 2
        assert records(batch, row) == records(alone, 0)
        assert int(batch.exact[row]) == int(alone.exact[0])
        for padded, plain in zip(batch.read(), alone.read(), strict=True):
            assert torch.equal(padded[row, :, at:], plain[0])


def test_queries_change_the_records_they_should():
    k, v = states(1, 300)
    loud = QueryStatistics("rms")
    loud.add(torch.ones(1, 4, 10, DIM) * torch.where(torch.arange(DIM) < 4, 100.0, 0.01), HEADS, None)
    info = _core.inspect(begin("default", k, v, queries=loud).record(0, 0, 0))
    bits = [[1, 2, 3, 4, 8, 16][t] for t in info["tier"]]
    assert min(bits[:4]) > max(bits[4:]), "the channels that queries look at get the most bits"
    assert begin("default", k, v).record(0, 0, 0) != begin("default", k, v, queries=loud).record(0, 0, 0)


@pytest.mark.parametrize("cut", [1, 7, 64, 300])
def test_query_statistics_do_not_depend_on_the_cut_into_calls(cut):
    q = torch.randn(2, 4, 300, DIM, generator=torch.Generator().manual_seed(3))
    whole, pieces = QueryStatistics("rms"), QueryStatistics("rms")
    first = torch.tensor([0, 50])
    whole.add(q, HEADS, first)
    for t in range(0, 300, cut):
        part = q[:, :, t : t + cut]
        pieces.add(part, HEADS, (first - t).clamp(0, part.shape[2]))
    assert torch.equal(whole.sum, pieces.sum) and whole.count.tolist() == pieces.count.tolist() == [600, 500]
    want = q[1, :2, 50:].double().pow(2).mean((0, 1)).sqrt().float()
    assert torch.allclose(whole.importance()[1, 0], want, rtol=1e-6)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision, bound", [("exact", 1e-5), ("default", 2e-3), ("fast", 6e-2)])
def test_attention_equals_attention_on_the_decoded_tensors(preset, precision, bound):
    k, v = states(2, 400)
    store = begin(preset, k, v, start=[0, 90])
    q = torch.randn(2, 4, 5, DIM, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(400) >= torch.tensor([0, 90]).view(2, 1, 1, 1)) & (
        torch.arange(400) <= torch.arange(395, 400).view(5, 1)
    )
    dense_k, dense_v = (t.repeat_interleave(2, 1) for t in store.read())
    want = torch.nn.functional.scaled_dot_product_attention(
        q.double(), dense_k.double(), dense_v.double(), attn_mask=mask
    )
    for options in ({"mask": mask}, {"causal": True}):
        got = store.attend(q, precision=precision, **options)
        assert (got.transpose(1, 2) - want).norm() < bound * want.norm()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("keep", [699, 640, 518, 517, 400, 391, 390, 389, 388, 386, 135, 132, 131, 5, 4, 1])
def test_crop_keeps_the_rest_and_goes_on(preset, keep):
    k, v = states(2, 700)
    store = begin(preset, k, v, start=[0, 129])
    before = store.read()
    kept = [records(store, row) for row in (0, 1)]
    store.crop(keep)
    for had, has in zip(before, store.read(), strict=True):
        assert torch.equal(has, had[:, :, :keep]), "what is kept does not change"
    for row in (0, 1):
        here = records(store, row)
        assert here == [head[: len(here[0])] for head in kept[row]], "whole blocks stay as they are"
        assert int(store.exact[row]) < 4 + 128 + 1
    more_k, more_v = states(2, 300, seed=4)
    grow(store, more_k, more_v, 0)
    assert store.length == keep + 300
    for has, had, new, old in zip(store.read(), before, (more_k, more_v), (k, v), strict=True):
        for row, start in enumerate((0, 129)):
            window = int(store.exact[row]) - store.config.sink_length
            assert torch.equal(has[row, :, keep + 300 - window :], new[row, :, 300 - window :]), (
                "the newest tokens are exact"
            )
            once = float((had - old)[row, :, start:].norm() / old[row, :, start:].norm())
            rest = (slice(None), slice(start, keep))
            if keep > start:
                twice = float((has[row][rest] - had[row][rest]).norm() / old[row][rest].norm())
                assert twice <= 1.5 * once, "older ones were packed at most once more"


def test_crop_drops_records_and_starts_the_key_reference_over():
    k, v = states(2, 700)
    store = begin("default", k, v, start=[0, 500])
    assert store.has_mu.tolist() == [[1, 1], [1, 1]]
    store.crop(560)
    assert store.blocks.tolist() == [4, 0] and store.has_mu.tolist() == [[1, 1], [0, 0]]
    assert store.place.shape[2] == 4 and int((store.place[1] >= 0).sum()) == 0
    sizes = sum(len(r) for head in records(store, 0) for r in head)
    assert sum(s.numel() for s in store.records.slabs) <= 2 * sizes, "dead records do not fill more than half of a slab"


@pytest.mark.parametrize("preset", PRESETS)
def test_rows_move_with_all_they_have(preset):
    k, v = states(3, 500)
    store = begin(preset, k, v, start=[0, 40, 260])
    store.queries.add(torch.randn(3, 4, 20, DIM), HEADS, torch.tensor([0, 3, 20]))
    rows = torch.tensor([2, 0, 0, 1, 2])
    moved = copy.deepcopy(store)
    moved.gather(rows)
    for had, has in zip(store.read(), moved.read(), strict=True):
        assert torch.equal(has, had[rows])
    for to, at in enumerate(rows.tolist()):
        assert records(moved, to) == records(store, at)
    if store.queries.sum is not None:
        assert torch.equal(moved.queries.sum, store.queries.sum[rows])
    more = states(5, 200, seed=2)
    grow(moved, *more, 0)
    for row in range(5):
        window = int(moved.exact[row]) - moved.config.sink_length
        assert torch.equal(moved.read()[0][row, :, 700 - window :], more[0][row, :, 200 - window :])


def test_repeated_rows_share_their_records():
    k, v = states(1, 1000)
    store = begin("default", k, v)
    slabs = sum(s.numel() for s in store.records.slabs)
    store.gather(torch.zeros(8, dtype=torch.int64))
    assert sum(s.numel() for s in store.records.slabs) == slabs
    assert store.totals().record_elements == 2 * 7 * 128 * DIM * HEADS, "each record counts once"


def test_slabs_without_live_records_go_and_half_dead_ones_are_rewritten():
    k, v = states(4, 400)
    store = begin("default", k, v)
    grow(store, *states(4, 128, seed=1), 0)
    full = [s.numel() for s in store.records.slabs]
    assert len(full) == 2
    one = records(store, 2)
    store.gather(torch.tensor([2]))
    assert [s.numel() for s in store.records.slabs] == [n // 4 for n in full]
    assert records(store, 0) == one


def test_records_of_different_sizes():
    """Thresholds give every record its own number of channels per tier."""
    generator = torch.Generator().manual_seed(0)
    k, v = states(3, 600)
    k = k * torch.rand(3, HEADS, 1, DIM, generator=generator) * 4
    store = begin("default", k, v, start=[0, 10, 333], allocate="threshold", key_reference="none")
    sizes = {len(store.record(0, h, j)) for h in range(HEADS) for j in range(4)}
    assert len(sizes) > 1
    assert sum(s.numel() for s in store.records.slabs) == store.totals().record_bytes, "slabs have no unused bytes"
    alone = begin("default", k[2:, :, 333:], v[2:, :, 333:], allocate="threshold", key_reference="none")
    assert records(store, 2) == records(alone, 0)


def test_a_pooled_budget_makes_records_of_different_length():
    k, v = states(1, 700)
    store = begin("layer", k, v)
    low, high = ([_core.inspect(record) for record in head] for head in records(store, 0))
    assert len(low) == 5 and all(a["nbytes"] < b["nbytes"] for a, b in zip(low, high, strict=True))
    even = reference.record_nbytes(store.codec, (0, 16, 0, 16, 0, 0))  # 3 columns: 3 bits for 32 channels
    assert all(a["nbytes"] + b["nbytes"] <= 2 * even for a, b in zip(low, high, strict=True))
    totals = store.totals()
    assert totals.record_bytes == sum(info["nbytes"] for info in low + high)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_values_that_are_not_finite_make_exact_records(bad, where):
    pair = list(states(2, 500))
    pair[where][1, 0, 200, 3] = bad  # row 1, head 0, second block
    store = begin("default", *pair)
    assert store.totals().exact_blocks == 1
    assert _core.inspect(store.record(1, 0, 1))["kind"] == 1 and _core.inspect(store.record(1, 1, 1))["kind"] == 0
    for had, has in zip(pair, store.read(), strict=True):
        assert torch.equal(has[1, 0, 132:260].nan_to_num(7.0), had[1, 0, 132:260].nan_to_num(7.0)), "the block is exact"
        assert bool(has[0].isfinite().all() and has[1, 1].isfinite().all()), "neighbours are unharmed"


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_and_pickles_are_equal_and_independent(preset):
    k, v = states(2, 400)
    store = begin(preset, k, v, start=[0, 7])
    store.attend(torch.randn(2, 4, 1, DIM))
    for other in (copy.deepcopy(store), pickle.loads(pickle.dumps(store))):
        assert all(torch.equal(a, b) for a, b in zip(store.read(), other.read(), strict=True))
        assert all(slab.data_ptr() % 64 == 0 for slab in other.records.slabs)
        more = states(2, 200, seed=8)
        before = store.read()
        grow(other, *more, 0)
        other.crop(450)
        assert all(torch.equal(a, b) for a, b in zip(store.read(), before, strict=True)), "the original is untouched"
        assert not {t.data_ptr() for t in store.tensors() if t.numel()} & {
            t.data_ptr() for t in other.tensors() if t.numel()
        }


def test_views_of_a_fused_projection_are_packed_where_they_lie_and_not_kept():
    fused = torch.randn(1, 500, 3, HEADS, DIM, generator=torch.Generator().manual_seed(0))
    k, v = fused[:, :, 1].transpose(1, 2), fused[:, :, 2].transpose(1, 2)
    store = begin("default", k, v)
    assert records(store, 0) == records(begin("default", k.contiguous(), v.contiguous()), 0)
    assert fused.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in store.tensors()}


def test_a_store_begun_in_inference_mode_goes_on_outside_and_back():
    with torch.inference_mode():
        k, v = states(1, 300)
        store = begin("default", k, v)
    with torch.no_grad():
        grow(store, *states(1, 300, seed=1), 0)
        store.crop(333)
    with torch.inference_mode():
        grow(store, *states(1, 140, seed=2), 0)
        store.gather(torch.tensor([0, 0]))
    assert store.length == 473 and store.blocks.tolist() == [3, 3]


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda store: pickle.loads(pickle.dumps(store))], ids=["copy", "pickle"]
)
def test_a_store_copied_in_inference_mode_goes_on_outside(how):
    store = begin("default", *states(2, 300), start=[0, 7])
    for each in (store.queries.sum, store.queries._partial):
        each.fill_(1)
    with torch.inference_mode():
        other = how(store)
        again = how(other)
    for each in (store, other, again):
        each.attend(torch.randn(2, 4, 1, DIM, generator=torch.Generator().manual_seed(3)), observe=True)
        each.queries.add(torch.ones(2, 4, 5, DIM), HEADS, torch.tensor([0, 2]))
        grow(each, *states(2, 300, seed=1), 0)
        each.crop(333)
        each.gather(torch.tensor([1, 0, 1]))
    for each in (other, again):
        assert not any(tensor.is_inference() for tensor in each.tensors())
        assert all(torch.equal(a, b) for a, b in zip(each.tensors(), store.tensors(), strict=True))


def test_buffers_grow_for_long_queries_and_shrink_back():
    k, v = states(1, 200)
    store = begin("default", k, v)
    capacity = store.k.shape[2]
    assert store.append(*states(1, 1000, seed=1)) and store.k.shape[2] >= 1000
    assert store.flush() and store.k.shape[2] == capacity == 132
    assert int(store.exact) < 132 and store.length == 1200


@pytest.mark.parametrize("margin", [0, 128])
def test_a_margin_keeps_more_tokens_exact(margin):
    k, v = states(1, 700)
    config = MixKVQConfig.preset("default")
    store = PackedStore.begin(
        config, config.codec(DIM, "float32"), k, v, torch.zeros(1, dtype=torch.int64), None, margin
    )
    assert 4 + margin <= int(store.exact) < 4 + 128 + margin
    for t in range(200):
        store.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        store.flush(margin)
        assert int(store.exact) < 4 + 128 + margin
    store.flush()
    assert int(store.exact) < 4 + 128
