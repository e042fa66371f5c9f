"""What the C extension accepts and refuses: arrays, tuples, sizes, environment; and what it holds on to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from mixkvq import _core, arrays
from mixkvq.config import MixKVQConfig

FIELDS = {
    "head_dim": 16,
    "block_length": 32,
    "dtype": 1,
    "allocate": 0,
    "key_group": 32,
    "key_metadata": 0,
    "key_range": 0,
    "key_reference": 0,
    "value_bits": 2,
    "value_group": 16,
    "value_metadata": 0,
    "value_range": 0,
    "value_rotation": 1,
    "pattern_cost": 0,
    "budget_columns": 0,
    "threshold_high": 1.0,
    "threshold_low": 0.5,
    "patterns": [[0, 16, 0, 0, 0, 0]],
}


def window(batch: int = 2, heads: int = 2, capacity: int = 8, dim: int = 16) -> dict[str, object]:
    """Arguments of a layer without packed blocks, three tokens in every row."""
    rng = np.random.default_rng(1)
    return {
        "k": rng.standard_normal((batch, heads, capacity, dim)).astype(np.float32),
        "v": rng.standard_normal((batch, heads, capacity, dim)).astype(np.float32),
        "exact": np.full(batch, 3),
        "start": None,
        "sink_length": 0,
        "slab_base": np.zeros(0, np.uint64),
        "slab_bytes": np.zeros(0, np.int64),
        "place": np.zeros((batch, heads, 0), np.int64),
        "blocks": np.zeros(batch, np.int64),
        "mu": None,
    }


def attend(layer, q, out=None, mask=None, causal=False, scaling=0.25, softcap=0.0, sink_logits=None):
    out = np.zeros(q.shape, np.float32) if out is None else out
    layer.attend(q, out, mask, causal, scaling, softcap, sink_logits, 1)
    return out


def queries(n: int = 1) -> np.ndarray:
    return np.random.default_rng(n).standard_normal((2, 4, n, 16)).astype(np.float32)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the installed package only."""
    return subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# ---- codecs --------------------------------------------------------------------------------------------------------
def test_a_codec_knows_its_largest_record():
    # one exact block: 64 bytes of header, then 32 tokens of 16 keys and values in float32
    assert _core.Codec(**FIELDS).record_bound == 64 + 2 * 32 * 16 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 12}, "head_dim is 12, must be a multiple of 8 from 8 to 256"),
        ({"block_length": 40}, "block_length is 40, must be a multiple of 32"),
        ({"value_bits": 5}, "value_bits is 5, must be 1, 2, 3, 4, 8, or 0"),
        ({"dtype": 4}, "dtype is 4, must be float32"),
        ({"patterns": []}, "n_patterns is 0, must be 1 to 16"),
        ({"patterns": [[0, 16, 0, 0, 0, 0]] * 17}, "n_patterns is 17, must be 1 to 16"),
        ({"patterns": [[0, 15, 0, 0, 0, 0]]}, "patterns is 15, must be channels that sum to head_dim"),
        ({"patterns": [[0, 17, -1, 0, 0, 0]]}, "patterns is -1, must be 0 to 256 channels"),
        ({"patterns": [[16]]}, "a pattern has 1 entries, must have 6"),
        ({"allocate": 1, "threshold_high": 0.1}, "threshold_high is .* must be at least threshold_low"),
    ],
)
def test_codec_errors_name_field_value_and_allowed(change, message):
    with pytest.raises(ValueError, match=message):
        _core.Codec(**{**FIELDS, **change})


@pytest.mark.parametrize("change", [{"head_dim": "16"}, {"head_dim": 16.0}, {"patterns": 3}, {"patterns": [["a"] * 6]}])
def test_codec_wants_numbers(change):
    with pytest.raises(TypeError):
        _core.Codec(**{**FIELDS, **change})


# ---- arrays --------------------------------------------------------------------------------------------------------
def misaligned(x: np.ndarray) -> np.ndarray:
    return np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def odd_stride(x: np.ndarray) -> np.ndarray:
    record = np.zeros(x.size, np.dtype([("x", x.dtype), ("pad", "u2")], align=False))
    return record["x"].reshape(x.shape)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q: q[0], ValueError, "q is 3-dimensional, must be 4-dimensional"),
        (lambda q: q.astype(np.float64), ValueError, "q is of dtype float64, must be float32, float16 or uint16"),
        (lambda q: q.astype(">f4"), ValueError, "q is byte-swapped or unaligned"),
        (misaligned, ValueError, "q is byte-swapped or unaligned"),
        (odd_stride, ValueError, "q is byte-swapped or unaligned|q has a stride"),
        (lambda q: q.tolist(), TypeError, "q is of type list, must be a NumPy array or a tuple"),
        (lambda q: q[..., :8], ValueError, "q is 8, must be of the history's head_dim"),
        (lambda q: q[:, :3], ValueError, "q is 3, must be of a multiple of the history's heads"),
        (lambda q: (1, 2, 3), TypeError, "q is a tuple of 3, must be .address, dtype, shape, strides."),
        (lambda q: (0, 1, (2, 4, 1), (1, 1, 1)), ValueError, "q is 3-dimensional"),
        (lambda q: (0, 1, (2, 4, -1, 16), (1,) * 4), ValueError, "q has size -1, must not be negative"),
        (lambda q: (0, 1, [2, 4, 1, 16], (1,) * 4), TypeError, "q: shape of the tuple form must be a tuple"),
        (lambda q: (0, 1, (2, 4, 1, 16), (64, 16, 16, 1)), ValueError, "q is 0, must be an address"),
        (lambda q: ("x", 1, (2, 4, 1, 16), (64, 16, 16, 1)), TypeError, "."),
    ],
)
def test_query_errors(change, error, message):
    q, out = change(queries()), np.zeros((2, 4, 1, 16), np.float32)
    if isinstance(q, np.ndarray) and q.ndim == 4:
        out = np.zeros(q.shape, np.float32)
    with pytest.raises(error, match=message):
        attend(_core.Layer(**window()), q, out)
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("exact", np.zeros(3, np.int64), "exact is of size 3 in dimension 0, must be of size 2"),
        ("exact", np.zeros(2, np.int32), "exact is of dtype int32, must be int64"),
        ("exact", np.array([9, 0]), "exact is 9, must be 0 to the buffer's tokens"),
        ("start", np.zeros(4, np.int64)[::2], "start is strided, must be C-contiguous"),
        ("place", np.zeros((2, 1, 0), np.int64), "place is of size 1 in dimension 1, must be of size 2"),
        ("blocks", np.array([1, 0]), "blocks is 1, must be 0 to the number of places per head"),
        ("mu", np.zeros((2, 2, 8), np.float16), "mu is of size 8 in dimension 2, must be of size 16"),
        ("mu", np.zeros((2, 2, 16), np.float32), "mu is of dtype float32, must be uint16 or float16"),
        ("v", np.zeros((2, 2, 9, 16), np.float32), "v is 9, must be of the same shape as its partner"),
    ],
)
def test_layer_errors(name, value, message):
    with pytest.raises(ValueError, match=message):
        attend(_core.Layer(**{**window(), name: value}), queries())


def test_places_must_lie_inside_their_slab():
    codec = MixKVQConfig(block_length=32, residual_length=32, key_group_size=32).codec(16, "float32")
    k = np.random.default_rng(0).standard_normal((1, 1, 32, 16)).astype(np.float32)
    packed = arrays.pack(codec, k, k)
    raw = packed.records[0][0][0]
    room = np.zeros(len(raw) + 64, np.uint8)
    slab = room[-room.ctypes.data % 64 :][: len(raw)]
    slab[:] = np.frombuffer(raw, np.uint8)
    layer = {
        **window(1, 1),
        "slab_base": np.array([slab.ctypes.data], np.uint64),
        "slab_bytes": np.array([slab.size]),
        "place": np.zeros((1, 1, 1), np.int64),
        "blocks": np.ones(1, np.int64),
        "mu": packed.mu,
    }
    q = queries()[:1]
    attend(_core.Layer(**layer), q)
    for place in (-1, 32, 64, slab.size, 1 << 40):
        with pytest.raises(ValueError, match=r"^(place|record) is"):
            attend(_core.Layer(**{**layer, "place": np.full((1, 1, 1), place)}), q)
    with pytest.raises(ValueError, match="mu is 0, must be given"):
        attend(_core.Layer(**{**layer, "mu": None}), q)
    slab[4] = 9
    with pytest.raises(ValueError, match="record version is 9, must be 1"):
        attend(_core.Layer(**layer), q)


def test_outputs_must_be_writable():
    layer, q = _core.Layer(**window()), queries()
    frozen = np.zeros(q.shape, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is a read-only array"):
        attend(layer, q, frozen)
    fixed = window()
    fixed["k"].flags.writeable = False
    attend(_core.Layer(**fixed), q)  # reading is fine
    with pytest.raises(ValueError, match="k is a read-only array"):
        _core.Layer(**fixed).append(np.zeros((2, 2, 1, 16), np.float32), np.zeros((2, 2, 1, 16), np.float32))
    assert fixed["exact"].tolist() == [3, 3]


def test_a_refused_pack_writes_nothing():
    codec = _core.Codec(**FIELDS)
    k = np.ones((1, 2, 64, 16), np.float32)
    bound, sizes = codec.record_bound, np.full((1, 2, 2), 7)
    first, blocks = np.zeros(1, np.int64), np.full(1, 2)
    with pytest.raises(ValueError, match=rf"out is {3 * bound} bytes, must be 4 records of out_stride \({bound}\)"):
        _core.pack(codec, k, k, first, blocks, None, None, None, np.zeros(3 * bound, np.uint8), bound, sizes, None)
    with pytest.raises(ValueError, match="out_stride"):
        _core.pack(codec, k, k, first, blocks, None, None, None, np.zeros(4 * bound, np.uint8), -64, sizes, None)
    with pytest.raises(TypeError, match="codec must be a"):
        _core.pack(1, k, k, first, blocks, None, None, None, np.zeros(4 * bound, np.uint8), bound, sizes, None)
    with pytest.raises(TypeError, match=r"1 arguments given, must be 12: pack\(codec"):
        _core.pack(codec)
    assert (sizes == 7).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": np.ones((2, 4, 2, 3), bool)}, ValueError, "mask is 2, must be of the shape of q"),
        ({"mask": np.ones((1, 1, 1, 2), bool)}, ValueError, "mask is 2, must be as wide as start plus all tokens"),
        ({"mask": np.ones((1, 1, 1, 3), np.int64)}, ValueError, "mask is of dtype int64, must be bool, float32"),
        ({"mask": np.ones((1, 1, 1, 3), bool), "causal": True}, ValueError, "causal is True, must be False"),
        ({"scaling": "x"}, TypeError, "scaling is 'x', must be a number"),
        ({"scaling": np.nan}, ValueError, "scaling is"),
        ({"softcap": -1.0}, ValueError, "softcap is -1, must be finite and not negative"),
        (
            {"sink_logits": np.zeros(3, np.float32)},
            ValueError,
            "sink_logits is of size 3 in dimension 0, must be of size 4",
        ),
    ],
)
def test_attend_errors(change, error, message):
    with pytest.raises(error, match=message):
        attend(_core.Layer(**window()), queries(), **change)


def test_negative_strides_are_read_as_they_are():
    plain, flipped = window(), window()
    for name in ("k", "v"):
        flipped[name] = np.ascontiguousarray(plain[name][:, ::-1])[:, ::-1]
        assert flipped[name].strides[1] < 0
    q = queries(2)
    assert (attend(_core.Layer(**plain), q) == attend(_core.Layer(**flipped), q)).all()


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (0, 1, 2, 3)])
def test_strides_of_zero_are_read_as_they_are(axes):
    """Rows, heads, tokens or channels that are all the same one, in everything that is only read."""

    def spread(x: np.ndarray) -> np.ndarray:
        first = x[tuple(slice(1) if axis in axes else slice(None) for axis in range(4))]
        return np.broadcast_to(first, x.shape)

    rng = np.random.default_rng(2)
    k, v, new = (spread(rng.standard_normal((2, 2, n, 16)).astype(np.float32)) for n in (70, 70, 5))
    q = spread(queries(5))
    assert all(k.strides[axis] == q.strides[axis] == 0 for axis in axes)
    codec = MixKVQConfig(block_length=32, residual_length=32, key_group_size=32).codec(16, "float32")
    results = []
    for make in (np.asarray, np.ascontiguousarray):
        packed = arrays.pack(codec, make(k), make(v), first=[1, 6])
        assert sum(len(head) for row in packed.records for head in row) == 8
        held = window()
        layer = _core.Layer(**held)
        layer.append(make(new), make(new))
        out = attend(layer, make(q))
        fixed = arrays.attend(make(q), packed.records, make(k), make(v), [60, 70], mu=packed.mu)
        salience = arrays.salience(make(q), 2, power=2)
        results.append((packed.records, packed.mu.tolist(), held["k"].tolist(), out.tolist(), fixed.tolist(),
                        salience.tolist()))  # fmt: skip
    assert results[0] == results[1]


def test_uint16_is_bfloat16():
    arguments, q = window(), queries()
    for name in ("k", "v"):
        arguments[name] = (arguments[name].view(np.uint32) >> 16).astype(np.uint16)
    wide = {**arguments, **{n: (arguments[n].astype(np.uint32) << 16).view(np.float32) for n in ("k", "v")}}
    assert (attend(_core.Layer(**arguments), q) == attend(_core.Layer(**wide), q)).all()


# ---- lifetimes, threads --------------------------------------------------------------------------------------------
def test_a_layer_sees_changes_in_place_and_lets_go_of_its_arrays():
    arguments, q = window(), queries()
    held = [name for name, x in arguments.items() if isinstance(x, np.ndarray)]
    before = [sys.getrefcount(arguments[name]) for name in held]
    layer = _core.Layer(**arguments)
    assert [sys.getrefcount(arguments[name]) for name in held] == [n + 1 for n in before]
    first = attend(layer, q)
    arguments["v"] *= 2
    assert np.allclose(attend(layer, q), 2 * first)
    arguments["exact"][:] = 0
    assert (attend(layer, q) == 0).all()
    del layer
    gc.collect()
    assert [sys.getrefcount(arguments[name]) for name in held] == before


def test_a_layer_keeps_where_its_records_lie_and_checks_them_once():
    """Tables changed behind its back are not looked at; a record that is none is refused when the layer is made."""
    codec = MixKVQConfig.preset("default", block_length=32, residual_length=32, key_group_size=32).codec(16, "float32")
    k = np.random.default_rng(2).standard_normal((1, 1, 32, 16)).astype(np.float32)
    packed = arrays.pack(codec, k, -k, first=[0], blocks=[1])
    record = np.frombuffer(packed.records[0][0][0], np.uint8)
    room = np.zeros(len(record) + 64, np.uint8)
    slab = room[-room.ctypes.data % 64 :][: len(record)]
    slab[:] = record
    arguments = window(1, 1) | {
        "slab_base": np.array([slab.ctypes.data], np.uint64),
        "slab_bytes": np.array([len(slab)]),
        "place": np.zeros((1, 1, 1), np.int64),
        "blocks": np.ones(1, np.int64),
        "mu": packed.mu,
    }
    layer, q = _core.Layer(**arguments), queries()[:1]
    first = attend(layer, q)
    assert (first != attend(_core.Layer(**window(1, 1)), q)).any()
    for name in ("slab_base", "slab_bytes", "place", "blocks"):
        arguments[name][:] = 1 << 30
    assert (attend(layer, q) == first).all()
    arguments |= {"slab_base": np.array([slab.ctypes.data], np.uint64), "slab_bytes": np.array([len(slab)])}
    arguments |= {"place": np.zeros((1, 1, 1), np.int64), "blocks": np.ones(1, np.int64)}
    slab[0] = 0
    with pytest.raises(ValueError, match=r"record is .*, must be 0x51564b4d"):
        _core.Layer(**arguments)


def test_refused_calls_leak_nothing():
    q, bad = queries(), window() | {"blocks": np.ones(2, np.int64)}
    gc.collect()
    references = sys.getrefcount(_core.Layer), sys.getrefcount(q)
    for _ in range(100):
        with pytest.raises(ValueError):
            attend(_core.Layer(**bad), q)
        with pytest.raises(ValueError):
            _core.Layer(**{**bad, "mu": np.zeros(3, np.float16)})
    gc.collect()
    assert (sys.getrefcount(_core.Layer), sys.getrefcount(q)) == references


def test_other_threads_run_during_a_call():
    arguments = window(1, 1, 4000)
    arguments["exact"][:] = 4000
    layer, q, out = (
        _core.Layer(**arguments),
        np.zeros((1, 1, 4000, 16), np.float32),
        np.zeros((1, 1, 4000, 16), np.float32),
    )
    begun, ended = threading.Event(), threading.Event()

    def call():
        begun.set()
        attend(layer, q, out)
        ended.set()

    thread = threading.Thread(target=call)
    started = time.perf_counter()
    thread.start()
    begun.wait()
    turns = 0
    while not ended.is_set():
        turns += 1
    took = time.perf_counter() - started
    thread.join()
    # with the GIL held this loop could only turn during the 5 ms slices around the call
    assert turns > 2000, f"{turns} turns in {took:.3f} s"


def test_a_handle_appends_in_one_thread_only():
    """What no thread has been told of is not there, and nothing is written behind the buffer."""
    room = np.zeros((2, 32, 8, 72, 64), np.float32)  # of 72 tokens 64 are the window's
    arguments = window(32, 8, 64, 64)
    arguments |= {"k": room[0, :, :, :64], "v": room[1, :, :, :64], "exact": np.zeros(32, np.int64)}
    layer, new = _core.Layer(**arguments), np.ones((32, 8, 1, 64), np.float32)
    appended, refused, others = [], [], []

    def call():
        for _ in range(200):
            try:
                layer.append(new, new)
                appended.append(1)
            except RuntimeError as error:
                refused.append(str(error))
            except ValueError as error:
                others.append(str(error))

    threads = [threading.Thread(target=call) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(appended) == 64 and (arguments["exact"] == 64).all() and not room[..., 64:, :].any()
    assert {*refused} <= {"the Layer is in use by another thread: append runs alone"}
    assert all("must be such that the new tokens fit" in message for message in others)
    assert len(appended) + len(refused) + len(others) == 800
    layer.attend(*(np.zeros((32, 8, 1, 64), np.float32) for _ in range(2)), None, False, 1.0, 0.0, None, 0)


def test_what_is_written_does_not_overlap_itself():
    arguments = window(2, 2, 8)
    row = np.zeros((1, 2, 8, 16), np.float32)
    shared = np.broadcast_to(row, (2, 2, 8, 16))
    shared.flags.writeable = True
    new = np.ones((2, 2, 1, 16), np.float32)
    layer = _core.Layer(**{**arguments, "k": shared})
    with pytest.raises(ValueError, match="k is 0, must be of strides other than 0, as it is written"):
        layer.append(new, new)
    with pytest.raises(ValueError, match="v is 0, must be of strides other than 0"):
        _core.Layer(**arguments).unpack(np.zeros((2, 2, 8, 16), np.float32), shared, np.zeros(2, np.int64))
    out = np.broadcast_to(np.zeros((1, 4, 1, 16), np.float32), (2, 4, 1, 16))
    out.flags.writeable = True
    with pytest.raises(ValueError, match="out is 0, must be of strides other than 0"):
        attend(layer, queries(), out)
    assert not row.any() and not out.any()
    layer.unpack(*(np.zeros((2, 2, 8, 16), np.float32) for _ in range(2)), np.zeros(2, np.int64))


def test_the_pool_may_be_taken_out_in_the_middle_of_a_call():
    """With a cap on threads every loop of a call looks it up; that of the references is the first of two."""
    done = python(
        """
        import ctypes, numpy as np
        from mixkvq import _core, arrays
        from mixkvq.config import MixKVQConfig
        Body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        calls = []
        @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Body, ctypes.c_void_p)
        def pool(begin, end, grain, body, ctx):
            calls.append((begin, end))
            _core.set_executor_address(0)
            body(begin, end, ctx)
            return 0
        k, v = np.random.default_rng(0).standard_normal((2, 2, 4, 256, 64)).astype(np.float32)
        codec = MixKVQConfig.preset("default").codec(64, "float32")
        plain = arrays.pack(codec, k, v)
        _core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value)
        assert arrays.pack(codec, k, v).records == plain.records
        print(calls)
        """,
        MIXKVQ_NUM_THREADS="2",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[(0, 8)]\n", "")


POOL = """
    import ctypes, numpy as np
    from mixkvq import _core, arrays
    Body = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    calls = []
    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, Body, ctypes.c_void_p)
    def pool(begin, end, grain, body, ctx):
        calls.append((begin, end, grain))
        for i in range(end, begin, -1):  # backwards, one by one
            body(i - 1, i, ctx)
        return STATUS
    q = np.random.default_rng(0).standard_normal((3, 4, TOKENS, 16))
    plain = arrays.salience(q.astype(np.float32), 2, power=2)
    _core.set_executor_address(ctypes.cast(pool, ctypes.c_void_p).value)
    again = arrays.salience(q.astype(np.float32), 2, power=2)
    assert (plain == again).all()
    _core.set_executor_address(0)
    arrays.salience(q.astype(np.float32), 2, power=2)
    print(calls)
"""


@pytest.mark.parametrize(("threads", "grain"), [("", 1), ("4", 2), ("2", 3), ("100", 1)])
def test_loops_run_in_the_pool_that_was_given(threads, grain):
    """Six units of work (three rows, two heads); MIXKVQ_NUM_THREADS caps the ranges they are cut into."""
    result = python(POOL.replace("STATUS", "0").replace("TOKENS", "700"), MIXKVQ_NUM_THREADS=threads)
    assert result.stdout.strip() == str([(0, 6, grain)]), result.stderr


@pytest.mark.parametrize(("threads", "tokens"), [("1", "700"), ("", "600")])
def test_one_thread_and_small_work_need_no_pool(threads, tokens):
    """3 · 4 · 600 · 16 elements are less than 2^17, 700 tokens are more."""
    result = python(POOL.replace("STATUS", "0").replace("TOKENS", tokens), MIXKVQ_NUM_THREADS=threads)
    assert result.stdout.strip() == "[]", result.stderr


# ---- environment ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name, supported in _core.isas() if supported])
def test_the_instruction_set_can_be_chosen(name):
    result = python("from mixkvq import _core; print(_core.isa())", MIXKVQ_ISA=name)
    assert result.stdout.strip() == name, result.stderr


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MIXKVQ_ISA", "sse9", "MIXKVQ_ISA is 'sse9', must be one of scalar"),
        ("MIXKVQ_NUM_THREADS", "two", "MIXKVQ_NUM_THREADS is 'two', must be a positive integer"),
        ("MIXKVQ_NUM_THREADS", "0", "MIXKVQ_NUM_THREADS is '0', must be a positive integer"),
    ],
)
def test_a_wrong_environment_is_an_import_error(variable, value, message):
    result = python("import mixkvq._core", **{variable: value})
    assert result.returncode == 1
    assert f"ImportError: {message}" in result.stderr


def test_set_isa_errors():
    before = _core.isa()
    with pytest.raises(ValueError, match="name is 'sse9', must be one of scalar"):
        _core.set_isa("sse9")
    with pytest.raises(ValueError, match=r"name is 'scalar\\x00x', must be one of scalar"):
        _core.set_isa("scalar\0x")
    with pytest.raises(TypeError, match="name is 3, must be a str or None"):
        _core.set_isa(3)
    assert _core.isa() == before


def test_inspect_wants_bytes():
    with pytest.raises(TypeError):
        _core.inspect("record")
    with pytest.raises(ValueError, match="record is 0, must be at least 64 bytes"):
        _core.inspect(b"")
    with pytest.raises(ValueError, match="not a MixKVQ record"):
        _core.inspect(bytes(64))
