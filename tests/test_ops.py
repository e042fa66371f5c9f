"""The torch face: equal to the NumPy face, opcheck of every operator, compiled graphs, the pool that runs the loops."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from mixkvq import arrays
from mixkvq.config import BlockCodec, MixKVQConfig

torch = pytest.importorskip("torch")
ops = pytest.importorskip("mixkvq.ops")
torch_module = pytest.importorskip("mixkvq.torch_module")

needs_torch_module = pytest.mark.skipif(
    torch_module.PROBLEM is not None, reason=f"mixkvq._torch: {torch_module.PROBLEM}"
)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def codec_of(dtype: str = "float32", **fields: object) -> BlockCodec:
    return MixKVQConfig.preset("default", block_length=64, residual_length=64, **fields).codec(32, dtype)


def numpy_of(x: torch.Tensor) -> np.ndarray:
    """The same bits: bfloat16 as uint16."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


@dataclasses.dataclass
class Case:
    """Two rows of two KV heads: two and one packed blocks, then a window of 10 and 7 tokens in buffers of 16."""

    codec: BlockCodec
    k: torch.Tensor
    v: torch.Tensor
    first: torch.Tensor
    blocks: torch.Tensor
    importance: torch.Tensor
    mu: torch.Tensor
    has_mu: torch.Tensor
    staging: torch.Tensor
    sizes: torch.Tensor
    place: torch.Tensor
    window: tuple[torch.Tensor, torch.Tensor]
    exact: torch.Tensor

    def layer(self) -> ops.Layer:
        slab = self.staging.view(-1)
        return ops.layer(*self.window, self.exact, None, 2, [slab], self.place, self.blocks, self.mu)

    def records(self) -> list[list[list[bytes]]]:
        staging, sizes = self.staging.numpy(), self.sizes.tolist()
        return [
            [[staging[b, h, j, : sizes[b][h][j]].tobytes() for j in range(int(self.blocks[b]))] for h in range(2)]
            for b in range(2)
        ]


def case(dtype: str = "float32") -> Case:
    generator = torch.Generator().manual_seed(5)
    codec = codec_of(dtype)
    fused = torch.randn(2, 140, 3, 2, 32, generator=generator).to(DTYPES[dtype])
    k, v = fused[:, :, 0].transpose(1, 2), fused[:, :, 2].transpose(1, 2)  # strided, as a model hands them over
    first, blocks = torch.tensor([3, 0]), torch.tensor([2, 1])
    importance = torch.rand(2, 2, 32, generator=generator)
    mu, has_mu = torch.zeros(2, 2, 32, dtype=torch.float16), torch.zeros(2, 2, dtype=torch.uint8)
    staging, sizes, _ = ops.pack(codec, k, v, first, blocks, 2, importance, mu, has_mu)
    place = torch.arange(8).view(2, 2, 2) * staging.shape[-1]
    window = tuple(torch.randn(2, 2, 16, 32, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    exact = torch.tensor([10, 7])
    return Case(codec, k, v, first, blocks, importance, mu, has_mu, staging, sizes, place, window, exact)


def queries(n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, n, 4, 32, generator=torch.Generator().manual_seed(n)).to(dtype).transpose(1, 2)


def op_arguments(c: Case, **options: object) -> tuple[object, ...]:
    chosen = {"mask": None, "causal": True, "scaling": 0.2, "softcap": 0.0, "sink_logits": None} | options
    window = (*c.window, c.exact, None, 2)
    return ([c.staging.view(-1)], c.place, c.blocks, c.mu, *window, *chosen.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_and_attend_equal_the_array_face(dtype):
    c = case(dtype)
    expected = arrays.pack(
        c.codec,
        numpy_of(c.k),
        numpy_of(c.v),
        first=c.first.numpy(),
        blocks=c.blocks.numpy(),
        importance=c.importance.numpy(),
    )
    assert c.records() == expected.records
    assert (c.mu.numpy() == expected.mu).all()
    assert c.has_mu.tolist() == [[1, 1], [1, 1]]
    q = queries(dtype=DTYPES[dtype])
    got = ops.attend(c.layer(), q, causal=True)
    windows = (numpy_of(x) for x in c.window)
    same = arrays.attend(
        numpy_of(q), c.records(), *windows, c.exact.numpy(), mu=c.mu.numpy(), sink_length=2, mask="causal"
    )
    assert got.shape == (2, 3, 4, 32)
    assert got.is_contiguous()
    assert got.dtype == DTYPES[dtype]
    assert torch.equal(got.transpose(1, 2), torch.from_numpy(same).to(DTYPES[dtype]))


def test_append_and_unpack_write_in_place():
    c = case()
    handle = c.layer()
    new = torch.randn(2, 3, 2, 32).transpose(1, 2)
    ops.append(handle, new, -new)
    assert c.exact.tolist() == [13, 10]
    for b, begin in enumerate((10, 7)):
        assert torch.equal(c.window[0][b, :, begin : begin + 3], new[b])
        assert torch.equal(c.window[1][b, :, begin : begin + 3], -new[b])
    k, v = torch.zeros(2, 2, 140, 32), torch.zeros(2, 2, 140, 32)
    ops.unpack(handle, k, v, c.first)
    for b, h, j in np.ndindex(2, 2, 2):
        if j < c.blocks[b]:
            expected = arrays.unpack(c.records()[b][h][j], mu=c.mu[b, h].numpy())
            begin = int(c.first[b]) + 64 * j
            assert (k[b, h, begin : begin + 64].numpy() == expected[0]).all()
            assert (v[b, h, begin : begin + 64].numpy() == expected[1]).all()
    assert (k[1, :, 64:] == 0).all()


def test_salience_adds_up():
    q, total = queries(9), torch.ones(2, 2, 32, dtype=torch.float64)
    ops.salience_(total, q, 2, 2, torch.tensor([0, 4]))
    expected = arrays.salience(q.numpy(), 2, power=2, first=[0, 4], sum=np.ones((2, 2, 32)))
    assert (total.numpy() == expected).all()


def test_a_mask_of_one_row_and_head_is_stretched():
    c, q = case(), queries(3)
    mask = torch.zeros(1, 1, 3, 140)
    mask[..., 5] = -torch.inf
    got = ops.attend(c.layer(), q, mask)
    full = ops.attend(c.layer(), q, mask.expand(2, 4, 3, 140).contiguous())
    assert torch.equal(got, full)
    assert not torch.equal(got, ops.attend(c.layer(), q))
    assert torch.equal(got, ops.attend(c.layer(), q, mask == 0))


def test_a_layer_keeps_its_tensors_alive():
    c = case()
    handle = ops.layer(
        c.window[0].clone(), c.window[1].clone(), c.exact.clone(), None, 2, [c.staging.view(-1).clone()],
        c.place.clone(), c.blocks.clone(), c.mu.clone(),
    )  # fmt: skip
    rubbish = [torch.full((c.staging.numel(),), 255, dtype=torch.uint8) for _ in range(4)]
    assert torch.equal(ops.attend(handle, queries()), ops.attend(c.layer(), queries()))
    del rubbish


@needs_torch_module
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same(threads):
    c, before = case(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again, q = case(), queries(40)
        assert again.records() == c.records()
        assert torch.equal(ops.attend(c.layer(), q, causal=True), ops.attend(again.layer(), q, causal=True))
    finally:
        torch.set_num_threads(before)


# ---- operators -----------------------------------------------------------------------------------------------------
@needs_torch_module
def test_opcheck_salience():
    total = torch.zeros(2, 2, 32, dtype=torch.float64)
    for first in (None, torch.tensor([0, 2])):
        torch.library.opcheck(torch.ops.mixkvq.salience_.default, (total, queries(), 2, 2, first))


@needs_torch_module
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_pack(dtype):
    c = case(dtype)
    arguments = (c.k, c.v, *arrays.codec_numbers(c.codec), c.first, c.blocks, 2)
    torch.library.opcheck(torch.ops.mixkvq.pack.default, (*arguments, c.importance, c.mu, c.has_mu))
    plain = dataclasses.replace(c.codec, key_reference=False)
    arguments = (c.k, c.v, *arrays.codec_numbers(plain), c.first, c.blocks, 2)
    torch.library.opcheck(torch.ops.mixkvq.pack.default, (*arguments, None, None, None))
    pooled = dataclasses.replace(c.codec, allocate="layer", budget_columns=3)
    arguments = (c.k, c.v, *arrays.codec_numbers(pooled), c.first, c.blocks, 2)
    torch.library.opcheck(torch.ops.mixkvq.pack.default, (*arguments, c.importance, c.mu, c.has_mu))
    by_op = torch.ops.mixkvq.pack(*arguments, c.importance, c.mu, c.has_mu)[1]
    assert torch.equal(by_op, ops.pack(pooled, c.k, c.v, c.first, c.blocks, 2, c.importance, c.mu, c.has_mu)[1])


@needs_torch_module
def test_opcheck_unpack():
    c = case()
    k, v = torch.zeros(2, 2, 140, 32), torch.zeros(2, 2, 140, 32)
    history = ([c.staging.view(-1)], c.place, c.blocks, c.mu)
    torch.library.opcheck(torch.ops.mixkvq.unpack.default, (*history, k, v, c.first))


@needs_torch_module
def test_opcheck_append():
    c = case()
    new = torch.randn(2, 2, 3, 32)
    torch.library.opcheck(torch.ops.mixkvq.append_.default, (*c.window, c.exact, new, -new))


@needs_torch_module
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"causal": False, "softcap": 5.0}, {"mask": True}, {"sink_logits": True}])
def test_opcheck_attend(dtype, options):
    c, q = case(dtype), queries(dtype=DTYPES[dtype])
    if "mask" in options:
        options = {"mask": torch.rand(1, 1, 3, 140) < 0.5, "causal": False}
    if "sink_logits" in options:
        options = {"sink_logits": torch.randn(4)}
    arguments = (q, *op_arguments(c, **options))
    torch.library.opcheck(torch.ops.mixkvq.attend.default, arguments)
    eager = ops.attend(c.layer(), q, **({"causal": True, "scaling": 0.2} | options))
    assert torch.equal(torch.ops.mixkvq.attend(*arguments), eager)


# ---- compiled graphs -----------------------------------------------------------------------------------------------
@needs_torch_module
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_attend_compiles_without_graph_breaks(backend, dynamic):
    c = case()
    handle = c.layer()

    def step(q: torch.Tensor) -> torch.Tensor:
        return ops.attend(handle, 2 * q, causal=True).flatten(2) + 1

    compiled = torch.compile(step, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (3, 5):
        assert torch.equal(compiled(queries(n)), step(queries(n)))


@needs_torch_module
def test_the_whole_decode_step_compiles():
    """append, attend, salience and pack in one graph, with what they change in place."""

    def step(handle: ops.Layer, k, v, q, total, codec, first, blocks, mu, has_mu):
        ops.append(handle, k, v)
        ops.salience_(total, q, 2, 2)
        packed = ops.pack(codec, handle.tensors.k, handle.tensors.v, first, blocks, 1, None, mu, has_mu)
        return ops.attend(handle, q), packed[1]

    def run(call):
        c = case()
        codec = dataclasses.replace(c.codec, block_length=32, key_group=32)
        c.window = tuple(torch.cat([x, x, x], 2).contiguous() for x in c.window)
        new, total = queries(3), torch.zeros(2, 2, 32, dtype=torch.float64)
        mu, has_mu = torch.zeros_like(c.mu), torch.zeros_like(c.has_mu)
        arguments = (c.layer(), new[:, :2], new[:, 2:], new, total, codec, torch.tensor([0, 3]), torch.tensor([1, 1]))
        return [*call(*arguments, mu, has_mu), total, mu, has_mu, c.exact, *c.window]

    expected = run(step)
    got = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


WITHOUT = """
    import sys
    sys.modules["mixkvq._torch"] = None  # as if it had not been built
    import torch
    from mixkvq import ops, torch_module
    assert torch_module.PARALLEL
    k = torch.randn(3, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    place, blocks = torch.zeros(3, 2, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    handle = ops.layer(k, k, torch.full((3,), 9), None, 0, [], place, blocks)
    q = k.repeat_interleave(2, dim=1)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert torch.allclose(ops.attend(handle, q, causal=True).transpose(1, 2), expected, atol=1e-5)
    try:
        torch.compile(lambda q: ops.attend(handle, q), fullgraph=True, backend="eager")(q)
    except Exception as error:
        print(error)
"""


def test_without_the_torch_module_all_but_compiled_graphs_works():
    """Eager calls still run in torch's pool, found by its address; torch.compile says what to install."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(WITHOUT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "torch.compile needs mixkvq._torch, and it was not built" in result.stdout
    assert "pip install --force-reinstall --no-deps --no-cache-dir " in result.stdout


def negated(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, negated when they are read."""
    view = torch.complex(x.float(), -x.float()).conj().imag
    assert view.is_neg() and torch.equal(view, x)
    return view


def test_views_that_negate_are_read_as_what_they_mean():
    c, n = case(), torch.ones(2, 2, 1, 32)
    handle, q = c.layer(), queries()
    assert torch.equal(ops.attend(handle, negated(q)), ops.attend(handle, q))
    packed = ops.pack(c.codec, negated(c.k), negated(c.v), c.first, c.blocks, 2, c.importance, c.mu, c.has_mu)
    assert dataclasses.replace(c, staging=packed[0], sizes=packed[1]).records() == c.records()
    sums = torch.zeros(2, 2, 2, 32, dtype=torch.float64)
    ops.salience_(sums[0], negated(q), 2, 1)
    ops.salience_(sums[1], q, 2, 1)
    assert torch.equal(*sums)
    ops.append(handle, negated(n), negated(-n))
    for row, at in enumerate((10, 7)):
        assert (c.window[0][row, :, at] == 1).all() and (c.window[1][row, :, at] == -1).all()
    with pytest.raises(ValueError, match="k is a view that negates what it reads, must be resolved"):
        ops.unpack(handle, negated(torch.zeros(2, 2, 140, 32)), torch.zeros(2, 2, 140, 32), c.first)
    with pytest.raises(ValueError, match="v is a view that negates what it reads, must be resolved"):
        ops.layer(c.window[0], negated(c.window[1]), c.exact, None, 2, [], c.place, torch.zeros_like(c.blocks))


# ---- errors --------------------------------------------------------------------------------------------------------
def test_errors_name_the_argument():
    c = case()
    handle = c.layer()
    with pytest.raises(ValueError, match=r"q is of dtype torch.float64, must be one of torch.float32"):
        ops.attend(handle, queries().double())
    with pytest.raises(ValueError, match=r"q is on meta, must be on the CPU"):
        ops.attend(handle, queries().to("meta"))
    with pytest.raises(ValueError, match=r"q is 3-dimensional"):
        ops.attend(handle, queries()[0])
    with pytest.raises(ValueError, match=r"exact is of dtype torch.int32, must be torch.int64"):
        ops.layer(*c.window, c.exact.int(), None, 0, [], c.place, c.blocks)
    with pytest.raises(ValueError, match=r"mu is of strides .* must be contiguous"):
        ops.layer(*c.window, c.exact, None, 0, [], c.place, c.blocks, c.mu.transpose(0, 1))
    with pytest.raises(ValueError, match=r"causal is True, must be False when a mask is given"):
        ops.attend(handle, queries(), torch.ones(1, 1, 3, 140, dtype=torch.bool), causal=True)
    with pytest.raises(ValueError, match=r"exact is 10, must be such that the new tokens fit"):
        ops.append(handle, torch.zeros(2, 2, 7, 32), torch.zeros(2, 2, 7, 32))
    assert c.exact.tolist() == [10, 7]


ATTEND = ("slabs", "place", "blocks", "mu", "k", "v", "exact", "start", "sink_length", "mask", "causal", "scaling")
"""Names of what `op_arguments` begins with."""


@needs_torch_module
@pytest.mark.parametrize("name, change, message", [
    ("q", lambda q: q[0], "q is 3-dimensional, must be 4-dimensional"),
    ("q", torch.Tensor.double, "q must be float32, float16 or bfloat16"),
    ("k", torch.Tensor.int, "k must be float32, float16 or bfloat16"),
    ("v", lambda v: v[:, :1], "v is .*, must be "),
    ("slabs", lambda slabs: [slabs[0][:64]], "nbytes is .*, must be at most the bytes available"),
    ("slabs", lambda slabs: [slabs[0].view(torch.int8)], "slabs has the wrong dtype"),
    ("slabs", lambda slabs: [slabs[0][::2]], "slabs must be contiguous"),
    ("place", lambda place: place[0], "place must be 3-dimensional"),
    ("place", lambda place: place[:, :1], "place is of size 1 in dimension 1, must be of size 2|place must be cont"),
    ("blocks", torch.Tensor.int, "blocks has the wrong dtype"),
    ("blocks", lambda blocks: blocks[None], "blocks is 2-dimensional, must be 1-dimensional"),
    ("mu", lambda mu: mu.transpose(0, 1), "mu must be contiguous"),
    ("exact", lambda exact: exact[:1], "exact is of size 1 in dimension 0, must be of size 2"),
    ("sink_length", lambda _: -1, "sink_length is -1, must be"),
    ("sink_length", lambda _: (1 << 32) + 2, "sink_length is 4294967298, must fit into 32 bits"),
    ("mask", lambda _: torch.ones(1, 1, 3, 140, dtype=torch.bool), "causal is True, must be False when a mask"),
    ("scaling", lambda _: float("nan"), "scaling is .*, must be"),
    ("precision", lambda _: 3, "precision is 3, must be 0, 1 or 2"),
    ("precision", lambda _: -1, "precision is -1, must be 0, 1 or 2"),
    ("block_tokens", lambda _: 65536, "block_tokens is 65536, must be from 0 to 65535"),
    ("block_tokens", lambda _: -1, "block_tokens is -1, must be from 0 to 65535"),
    ("record_bytes", lambda _: -1, "record_bytes is -1, must not be negative"),
    ("record_bytes", lambda _: 64, "slabs are 1, must be none where record_bytes says that places are addresses"),
])  # fmt: skip
def test_operators_check_what_the_core_will_touch(name, change, message):
    c = case()
    arguments = {"q": queries(), **dict(zip(ATTEND, op_arguments(c), strict=False))}
    arguments |= {"softcap": 0.0, "sink_logits": None}
    torch.ops.mixkvq.attend(**arguments)
    before = [t.clone() for t in (c.staging, c.place, c.blocks, c.mu, *c.window, c.exact)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mixkvq.attend(**arguments | {name: change(arguments.get(name))})
    for was, now in zip(before, (c.staging, c.place, c.blocks, c.mu, *c.window, c.exact), strict=True):
        assert torch.equal(was, now)


@needs_torch_module
@pytest.mark.parametrize("name, value, message", [
    ("codec", [1, 2], "codec must be 15 fields and 6 channel counts per pattern"),
    ("codec", [0] * 22, "codec must be 15 fields and 6 channel counts per pattern"),
    ("thresholds", [1.0], "codec must be 15 fields .*, thresholds 2 numbers"),
    ("codec", [-1] + [0] * 14, "codec has a field -1, must be 0 to 65535"),
    ("codec", [7] + [0] * 14, "head_dim is 7, must be"),
    ("max_blocks", -1, "max_blocks is -1, must not be negative"),
    ("importance", torch.zeros(2, 2, 8), "importance is of size 8 in dimension 2, must be of size 32"),
    ("has_mu", torch.zeros(2, 2), "has_mu has the wrong dtype"),
])  # fmt: skip
def test_the_operator_that_packs_checks_as_well(name, value, message):
    c = case()
    fields, thresholds = arrays.codec_numbers(c.codec)
    arguments = {"k": c.k, "v": c.v, "codec": fields, "thresholds": thresholds, "first": c.first, "blocks": c.blocks}
    arguments |= {"max_blocks": 2, "importance": None, "mu": c.mu, "has_mu": c.has_mu}
    torch.ops.mixkvq.pack(**arguments)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mixkvq.pack(**arguments | {name: value})
