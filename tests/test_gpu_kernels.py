"""Kernels on a GPU against the CPU core: equal records and sums, attention within its bounds, at real shapes.

Skipped without a GPU. MIXKVQ_REHEARSE=1 runs it on CPU tensors, which says nothing of a GPU but that this file works.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mixkvq import MixKVQConfig, ops, torch_module  # noqa: E402
from mixkvq.config import BlockCodec  # noqa: E402

REHEARSE = os.environ.get("MIXKVQ_REHEARSE") == "1"
DEVICE = "cpu" if REHEARSE else "cuda"


def _missing() -> str | None:
    if REHEARSE:
        return None
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    return getattr(torch_module, "CUDA_PROBLEM", "this version has no CUDA kernels")


_MISSING = _missing()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PRESETS = ("default", "compact", "near-lossless", "paper", "kivi-2", "kivi-4", "lossless")
HEADS, BATCH = 3, 2
BOUND = {"exact": 1e-5, "default": 2e-3}
ROUNDING = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def states(tokens: int, dim: int, dtype: str, batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, n, D] with channels of unequal width and offset, cut from a fused projection."""
    width, middle = (0.6 * noise(1, 1, 2, HEADS, dim, seed=1)).exp(), noise(1, 1, 2, HEADS, dim, seed=2)
    fused = (noise(batch, tokens, 2, HEADS, dim, seed=3) * width + middle).to(DTYPES[dtype])
    return fused[:, :, 0].transpose(1, 2), fused[:, :, 1].transpose(1, 2)


def codec_of(preset: str, dim: int, dtype: str) -> BlockCodec:
    return MixKVQConfig.preset(preset).codec(dim, dtype)


def on(device: str, *tensors: Any) -> list[Any]:
    """The tensors there, with the strides they have; what is no tensor stays."""
    found = []
    for x in tensors:
        if isinstance(x, torch.Tensor):
            base = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
            x = base.copy_(x)
        found.append(x)
    return found


def packed_on(device: str, codec: BlockCodec, k: torch.Tensor, v: torch.Tensor, blocks: list[int]) -> dict[str, Any]:
    """Everything that `ops.pack` gives or changes, on the CPU."""
    first = torch.arange(len(blocks)) * 5
    importance = noise(len(blocks), HEADS, k.shape[3], seed=4).abs()
    mu = has_mu = None
    if codec.key_reference and codec.allocate != "exact":
        mu = torch.zeros(len(blocks), HEADS, k.shape[3], dtype=torch.float16)
        has_mu = torch.zeros(len(blocks), HEADS, dtype=torch.uint8)
    k, v, first, counts, importance, mu, has_mu = on(device, k, v, first, torch.tensor(blocks), importance, mu, has_mu)
    staging, sizes, raised = ops.pack(codec, k, v, first, counts, max(blocks), importance, mu, has_mu)
    found = {"staging": staging, "sizes": sizes, "raised": raised, "mu": mu, "has_mu": has_mu}
    return {name: None if x is None else x.cpu() for name, x in found.items()}


def records(packed: dict[str, Any]) -> Iterator[bytes]:
    for slot, size in zip(packed["staging"].flatten(0, 2), packed["sizes"].flatten().tolist(), strict=True):
        yield slot[:size].numpy().tobytes()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_records_are_those_of_the_cpu(preset, dim, dtype):
    codec, (k, v) = codec_of(preset, dim, dtype), states(3 * 128 + 20, dim, dtype)
    mine, theirs = (packed_on(device, codec, k, v, [3, 2]) for device in (DEVICE, "cpu"))
    for name in ("sizes", "raised", "mu", "has_mu"):
        assert (mine[name] is None) == (theirs[name] is None), name
        assert mine[name] is None or torch.equal(mine[name], theirs[name]), name
    for got, want in zip(records(mine), records(theirs), strict=True):
        assert got == want


def test_a_block_that_cannot_be_coded_is_exact_on_both():
    k, v = states(3 * 128 + 20, 128, "bfloat16")
    k[0, 1, 200, 7], v[1, 0, 30, 3] = float("nan"), float("inf")
    codec = codec_of("default", 128, "bfloat16")
    mine, theirs = (packed_on(device, codec, k, v, [3, 2]) for device in (DEVICE, "cpu"))
    assert list(records(mine)) == list(records(theirs))
    assert len(set(theirs["sizes"].flatten().tolist()) - {0}) == 2


def layer_on(device: str, codec: BlockCodec, dtype: str, blocks: list[int], exact: list[int], sinks: int) -> Any:
    """A layer over records of the CPU, and a window of 40 tokens of which rows use ``exact[b]``."""
    k, v = states(max(blocks) * codec.block_length + 20, codec.head_dim, dtype, len(blocks))
    packed = packed_on("cpu", codec, k, v, blocks)
    window = states(40, codec.head_dim, dtype, len(blocks))
    place = torch.arange(packed["sizes"].numel()).view(packed["sizes"].shape) * packed["staging"].shape[-1]
    side = [torch.tensor(exact), None, sinks]
    parts = on(device, *(x.contiguous() for x in window), *side)
    slab, place, counts, mu = on(device, packed["staging"].flatten(), place, torch.tensor(blocks), packed["mu"])
    return ops.layer(*parts, [slab], place, counts, mu)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of the worst row and head over all queries."""
    got, want = got.cpu().double().transpose(1, 2).flatten(2), want.double().transpose(1, 2).flatten(2)
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1)).max())


def mask_of(kind: str, batch: int, n: int, columns: int) -> torch.Tensor | None:
    if kind not in ("bool", "float"):
        return None
    seen = noise(batch, 1, n, columns, seed=9) < 1.0
    return seen if kind == "bool" else torch.where(seen, noise(batch, 1, n, columns, seed=10), -torch.inf)


@pytest.mark.parametrize(
    ("preset", "dim", "dtype", "group", "n", "mask"),
    [
        ("default", 128, "bfloat16", 4, 1, "none"),
        ("default", 128, "float16", 1, 1, "none"),
        ("compact", 128, "bfloat16", 8, 1, "causal"),
        ("near-lossless", 128, "bfloat16", 16, 1, "bool"),
        ("paper", 128, "float16", 4, 3, "causal"),
        ("kivi-2", 64, "bfloat16", 3, 2, "float"),
        ("kivi-4", 96, "float16", 2, 16, "causal"),
        ("default", 80, "bfloat16", 5, 1, "none"),
        ("default", 192, "float16", 2, 4, "causal"),
        ("compact", 256, "bfloat16", 4, 1, "bool"),
        ("lossless", 128, "bfloat16", 4, 1, "none"),
        ("default", 128, "float32", 4, 1, "none"),
    ],
)
@pytest.mark.parametrize("precision", ["default", "exact"])
def test_attention_is_within_its_bound(preset, dim, dtype, group, n, mask, precision):
    codec, blocks, exact = codec_of(preset, dim, dtype), [5, 2, 0], [9, 40, 17]
    q = (0.5 * noise(3, n, HEADS * group, dim, seed=5)).to(DTYPES[dtype]).transpose(1, 2)
    wide = mask_of(mask, 3, n, 5 * codec.block_length + 40)
    there = layer_on(DEVICE, codec, dtype, blocks, exact, 4)
    got = ops.attend(there, *on(DEVICE, q, wide), mask == "causal", precision=precision)
    truth = ops.attend(
        layer_on("cpu", codec, dtype, blocks, exact, 4), q.float(), wide, mask == "causal", precision="exact"
    )
    assert got.dtype == q.dtype and got.shape == truth.shape
    assert relative_error(got, truth) <= BOUND[precision] + ROUNDING[q.dtype]
    assert torch.equal(got, ops.attend(there, *on(DEVICE, q, wide), mask == "causal", precision=precision))


def test_a_history_of_many_blocks_is_cut_and_merged():
    codec, blocks = codec_of("default", 128, "bfloat16"), [70, 1]
    q = noise(2, 1, HEADS * 4, 128, seed=6).to(torch.bfloat16).transpose(1, 2)
    options = {"softcap": 30.0, "sink_logits": noise(HEADS * 4, seed=7)}
    there, here = (layer_on(device, codec, "bfloat16", blocks, [40, 5], 4) for device in (DEVICE, "cpu"))
    want = ops.attend(here, q.float(), precision="exact", **options)
    options["sink_logits"] = options["sink_logits"].to(DEVICE)
    for _ in range(3):  # what the first call leaves in the workspace must not matter
        got = ops.attend(there, q.to(DEVICE), **options)
        assert relative_error(got, want) <= BOUND["default"] + ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("preset", ["default", "kivi-2", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_keys_and_values_are_those_of_the_cpu(preset, dtype):
    codec, found = codec_of(preset, 128, dtype), []
    for device in (DEVICE, "cpu"):
        k, v = (torch.zeros(2, HEADS, 300, 128, dtype=DTYPES[dtype], device=device) for _ in "kv")
        ops.unpack(layer_on(device, codec, dtype, [2, 1], [7, 7], 4), k, v, torch.tensor([4, 9], device=device))
        found.append((k.cpu(), v.cpu()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_appended_tokens_and_query_sums_are_those_of_the_cpu(dtype):
    codec, found = codec_of("default", 128, dtype), []
    new = states(6, 128, dtype)
    q = noise(2, 50, HEADS * 4, 128, seed=8).to(DTYPES[dtype]).transpose(1, 2)
    for device in (DEVICE, "cpu"):
        layer = layer_on(device, codec, dtype, [1, 1], [9, 21], 4)
        ops.append(layer, *on(device, *new))
        total = torch.ones(2, HEADS, 128, dtype=torch.float64, device=device)
        ops.salience_(total, *on(device, q), HEADS, 2, torch.tensor([0, 13], device=device))
        parts = layer.tensors
        found.append([x.cpu() for x in (parts.k, parts.v, parts.exact, total)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)
