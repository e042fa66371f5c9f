"""From `MixKVQCache` to the source of the CUDA kernels, which runs on the host: operators over the emulator's table."""

from __future__ import annotations

import ctypes

import pytest
import torch
from models import assert_same_tokens, generate, paths, prompts, tiny
from test_ops import case, needs_torch_module, queries
from test_store import begin, grow, records, states

from mixkvq import MixKVQCache, operators, ops, torch_module

emulator = pytest.importorskip("emulator")
pytestmark = [emulator.NEEDED, needs_torch_module]
VERBS = ("salience", "pack", "unpack", "append", "attend", "attend_workspace")
DIM = 32


class Api(ctypes.Structure):
    """mkvq_cuda_api of csrc/cuda/mixkvq_cuda.h."""

    _fields_ = (("version", ctypes.c_uint32), *((verb, ctypes.c_void_p) for verb in VERBS))


def capsule_of(api: Api) -> object:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(api), b"mixkvq._cuda._C_API", None)


def use(api: Api) -> None:
    from mixkvq import _torch

    _torch.set_cuda(capsule_of(api), 0, True)


@pytest.fixture
def kernels(monkeypatch):
    """CPU tensors are served by the emulated kernels."""
    library = emulator.library()
    addresses = (ctypes.cast(getattr(library, f"mkvq_cuda_{verb}"), ctypes.c_void_p).value for verb in VERBS)
    api = Api(3, *addresses)
    monkeypatch.setattr(operators, "rehearsing", True)
    use(api)
    yield api
    from mixkvq import _torch

    _torch.set_cuda(None)
    torch_module._load_cuda()


def handles(c, monkeypatch, **options):
    """The same layer for the kernels and for the core."""
    parts = (*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu)
    there = ops.layer(*parts, **options)
    with monkeypatch.context() as patch:
        patch.setattr(operators, "rehearsing", False)
        return there, ops.layer(*parts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_verbs_through_the_operators(kernels, monkeypatch, dtype):
    c = case(dtype)  # packed by the kernels
    there, here = handles(c, monkeypatch, capacity=20)
    dtype = c.k.dtype
    monkeypatch.setattr(operators, "rehearsing", False)
    torch.manual_seed(0)
    by_core = case(str(dtype).removeprefix("torch."))
    assert by_core.records() == c.records() and torch.equal(by_core.mu, c.mu)
    for n in (1, 3):
        q, mask = queries(n, dtype=dtype), torch.rand(1, 1, n, 140) < 0.7
        for options in ({"mask": mask}, {"causal": True}, {"softcap": 5.0}, {"sink_logits": torch.randn(4)}):
            for precision, bound in (("exact", 1e-5), ("default", 2e-3)):
                want = ops.attend(here, q.float(), precision="exact", **options).double()
                got = ops.attend(there, q.float(), precision=precision, **options).double()
                assert float((got - want).norm()) <= bound * float(want.norm()), (n, options, precision)
    assert there._workspace is not None and there.workspaces.tensors()
    counters = there.workspaces.tensors()[0]
    assert not counters[: 4 * 2 * 2].any(), "left as they were found"
    decoded = [torch.zeros(2, 2, 140, 32, dtype=dtype) for _ in range(4)]
    ops.unpack(there, *decoded[:2], c.first)
    ops.unpack(here, *decoded[2:], c.first)
    assert torch.equal(decoded[0], decoded[2]) and torch.equal(decoded[1], decoded[3])
    new = queries(3, dtype=dtype)
    ops.append(there, new[:, :2], new[:, 2:])
    assert c.exact.tolist() == [13, 10] and torch.equal(c.window[1][1, :, 7:10], new[1, 2:])


@pytest.mark.parametrize("preset", ["default", "lossless"])
def test_a_store_has_the_same_records(kernels, monkeypatch, preset):
    k, v = states(2, 460)
    q = torch.randn(2, 4, 1, DIM, generator=torch.Generator().manual_seed(2))
    found = []
    for rehearsing in (True, False):
        monkeypatch.setattr(operators, "rehearsing", rehearsing)
        store = begin(preset, k[:, :, :400], v[:, :, :400], start=[0, 129])
        store.attend(q, observe=True)
        grow(store, k, v, 400, 20)
        found.append(([records(store, row) for row in (0, 1)], store.read(), store.attend(q, precision="exact")))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention, lengths", [("sdpa", [70, 51]), ("eager", [70])])
def test_a_model_generates_with_emulated_kernels(kernels, monkeypatch, attention, lengths):
    model, inputs, found = tiny("llama", attention), prompts(lengths), []
    for rehearsing in (True, False):
        monkeypatch.setattr(operators, "rehearsing", rehearsing)
        used = MixKVQCache(block_length=32, residual_length=32, key_group_size=32)
        found.append((generate(model, inputs, used, 34), used))
    (got, first), (want, second) = found
    assert_same_tokens(want, got, 2e-3)
    assert paths(first) == paths(second) == ["packed"] * 2
    assert all(layer.dequantizations == 0 for layer in first.layers)
    report = first.report()
    assert report.nbytes >= sum(t.numel() for t in first.placement.workspaces.tensors()) > 0


# ---- errors --------------------------------------------------------------------------------------------------------
FAIL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)


def test_a_call_that_cuda_refuses_says_what_cuda_says(kernels):
    class Error(ctypes.Structure):
        _fields_ = (("argument", ctypes.c_char_p), ("allowed", ctypes.c_char_p), ("value", ctypes.c_int64))

    @FAIL
    def fail(args, stream, error):
        found = Error.from_address(error)
        found.argument, found.allowed, found.value = b"CUDA error", b"no kernel image is available", 209
        return 10  # MKVQ_E_DEVICE

    kernels.append = ctypes.cast(fail, ctypes.c_void_p).value
    c = case()
    handle = ops.layer(*c.window, c.exact, None, 2, [c.staging.view(-1)], c.place, c.blocks, c.mu)
    with pytest.raises(RuntimeError, match="CUDA error 209: no kernel image is available"):
        ops.append(handle, queries()[:, :2], queries()[:, :2])


def test_kernels_of_another_version_are_refused():
    with pytest.raises(ImportError, match=r"mixkvq._torch and mixkvq._cuda are of different versions: reinstall"):
        use(Api(2))
    from mixkvq import _torch

    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with incorrect name"):
        _torch.set_cuda(__import__("mixkvq")._core._C_API)
