"""Calls of mixkvq._core that allocate, with every one of their allocations failing; for `test_faults_bindings.py`."""

from __future__ import annotations

import gc
import importlib.machinery
import importlib.util
import sys
from types import NoneType
from typing import Any

import numpy as np
from failing import PLAIN, every
from test_bind import FIELDS, attend, queries, window

from mixkvq import MixKVQConfig, _core, arrays

MODULE = b"mixkvq/_core"


def aligned(nbytes: int) -> np.ndarray:
    memory = np.zeros(nbytes + 64, np.uint8)
    return memory[-memory.ctypes.data % 64 :][:nbytes]


def packed(blocks: int = 16) -> tuple[bytes, dict[str, Any], np.ndarray]:
    """A record; arguments of a layer with such records, enough for attention to be cut into runs; their slab."""
    fields = {"block_length": 32, "residual_length": 32, "key_group_size": 32}
    codec = MixKVQConfig.preset("default", **fields).codec(16, "float32")
    k, v = np.random.default_rng(2).standard_normal((2, 1, 1, 32 * blocks, 16)).astype(np.float32)
    found = arrays.pack(codec, k, v, first=[0], blocks=[blocks])
    records = [bytes(record) for record in found.records[0][0]]
    slab = aligned(sum(map(len, records)))
    slab[:] = np.frombuffer(b"".join(records), np.uint8)
    layer = window(1, 1) | {
        "slab_base": np.array([slab.ctypes.data], np.uint64),
        "slab_bytes": np.array([len(slab)]),
        "place": np.cumsum([0, *map(len, records[:-1])]).reshape(1, 1, -1),
        "blocks": np.array([blocks]),
        "mu": found.mu,
    }
    return records[0], layer, slab


def new_module() -> Any:
    """mixkvq._core once more, under another name."""
    loader = importlib.machinery.ExtensionFileLoader("mixkvq._core", _core.__file__)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("mixkvq._core", loader))
    loader.exec_module(module)
    return sorted(vars(module))


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else None if isinstance(value, _core.Codec) else value


def held() -> tuple[int, ...]:
    gc.collect()
    return tuple(sys.getrefcount(kind) for kind in (_core.Codec, _core.Layer, np.ndarray))


def working() -> dict[str, Any]:
    """Calls that give a result, which is the same every time."""
    record, layer_arguments, slab = packed()
    layer, q = _core.Layer(**layer_arguments), np.ones((1, 2, 3, 16), np.float32)
    codec = _core.Codec(**FIELDS)
    k, many = np.ones((1, 1, 40, 16), np.float32), iter(range(1, 10_000))

    def attend_more() -> Any:
        """More queries every time, so that the kept workspace is too small."""
        return attend(layer, np.ones((1, 2, 4 * next(many), 16), np.float32))[0, 0, 0]

    def unpack() -> Any:
        out = np.zeros((2, 1, 1, 512, 16), np.float32)
        layer.unpack(out[0], out[1], np.zeros(1, np.int64))
        return out

    def pack() -> Any:
        out, sizes = aligned(8192), np.zeros((1, 1, 1), np.int64)
        none = None, None, None
        _core.pack(codec, k, k, np.zeros(1, np.int64), np.ones(1, np.int64), *none, out, 8192, sizes, None)
        return out

    def append() -> Any:
        arguments = window(1, 1)
        _core.Layer(**arguments).append(k[:, :, :2], k[:, :, :2])
        return arguments["k"]

    def salience() -> Any:
        total = np.zeros((1, 1, 16))
        _core.salience(q, 1, 2, None, total)
        return total

    return {
        "import": new_module,
        "Codec": lambda: _core.Codec(**FIELDS),
        "record_bound": lambda: codec.record_bound,
        "Layer": lambda: attend(_core.Layer(**layer_arguments), q)[0, 0] + 0 * slab[:16],
        "attend": attend_more,
        "unpack": unpack,
        "pack": pack,
        "append": append,
        "salience": salience,
        "inspect": lambda: _core.inspect(record),
        "isa": _core.isa,
        "isas": _core.isas,
        "build_info": _core.build_info,
    }


def refused() -> dict[str, Any]:
    """Calls that are errors, at least one for every place in csrc/bind that says so."""
    q, layer, many = queries(), _core.Layer(**window()), 1 << 40
    shape, read_only = (2, 4, 1, 16), np.zeros((2, 4, 1, 16), np.float32)
    read_only.flags.writeable = False
    out, one = np.zeros(shape, np.float32), np.ones(2, np.int64)
    k = np.ones((2, 2, 40, 16), np.float32)
    frozen = window()
    frozen["exact"].flags.writeable = False
    codec = _core.Codec(**FIELDS)

    def made(**fields: Any) -> Any:
        return lambda: _core.Layer(**(window() | fields))

    def coded(**fields: Any) -> Any:
        return lambda: _core.Codec(**(FIELDS | fields))

    def asked(query: Any = q, output: Any = out, *rest: Any) -> Any:
        given = [*rest, *(None, False, 0.25, 0.0, None, 1)[len(rest) :]]
        return lambda: layer.attend(query, output, *given)

    def packs(**change: Any) -> Any:
        given = {
            "codec": codec, "k": k, "v": k, "first": one, "blocks": one, "importance": None, "mu": None,
            "has_mu": None, "out": aligned(1 << 16), "stride": 8192,
            "sizes": np.zeros((2, 2, 1), np.int64), "raised": None,
        } | change  # fmt: skip
        return lambda: _core.pack(*given.values())

    strided = np.zeros((2, 4, 1, 33), np.float32).view(np.uint8)[..., 1:129:8]
    padded = np.zeros((2, 2, 4, 16), np.dtype([("x", "f4"), ("y", "f2")], align=False))["x"]
    halves = np.lib.stride_tricks.as_strided(np.zeros(999, np.uint16), (2, 4, 1, 16), (300, 60, 60, 3))
    return {
        "no array": asked(q.tolist()),
        "dtype": asked(q.astype(np.float64)),
        "dimensions": asked(q[0]),
        "swapped": asked(q.astype(">f4")),
        "read-only": asked(q, read_only),
        "strange stride": asked(halves),
        "strange memory": made(k=padded),
        "bytes": asked(strided),
        "mask": asked(q, out, np.zeros(shape, np.int32)),
        "causal with mask": asked(q, out, out, True),
        "short tuple": asked((1, 2, 3)),
        "list in a tuple": asked((0, 1, [*shape], (1,) * 4)),
        "short shape": asked((0, 1, (2, 4, 1), (1, 1, 1))),
        "negative size": asked((0, 1, (2, 4, -1, 16), (1,) * 4)),
        "wide dtype": asked((0, 1 << 40, shape, (1,) * 4)),
        "wider dtype": asked((0, 1 << 80, shape, (1,) * 4)),
        "text for a dtype": asked((0, "x", shape, (1,) * 4)),
        "text for an address": asked(("x", 1, shape, (1,) * 4)),
        "no address": asked((0, 1, shape, (64, 16, 16, 1))),
        "text for a number": asked(q, out, None, False, "x"),
        "few arguments": lambda: layer.attend(q),
        "few of append": lambda: layer.append(q),
        "few of unpack": lambda: layer.unpack(q),
        "few of pack": lambda: _core.pack(1),
        "few of salience": lambda: _core.salience(1),
        "no codec": packs(codec=3),
        "small output": packs(stride=1 << 20),
        "record does not fit": packs(stride=64),
        "sizes": made(blocks=np.ones(3, np.int64)),
        "dense dtype": made(blocks=np.ones(2)),
        "dense stride": made(blocks=np.ones(4, np.int64)[::2]),
        "dense dimensions": made(blocks=np.ones((2, 1), np.int64)),
        "dense list": made(blocks=[1, 1]),
        "no room for a record": made(blocks=one),
        "huge": made(k=(8, 1, (many, 2, 8, 16), (1,) * 4)),
        "appending to what is read-only": lambda: _core.Layer(**frozen).append(k, k),
        "codec without fields": lambda: _core.Codec(),
        "codec of text": coded(head_dim="x"),
        "head_dim": coded(head_dim=7),
        "patterns": coded(patterns=[[0, 16]]),
        "many patterns": coded(patterns=[[0, 16, 0, 0, 0, 0]] * 99),
        "negative pattern": coded(patterns=[[0, -16, 0, 0, 0, 0]]),
        "pattern of numbers": coded(patterns=[3]),
        "no patterns": coded(patterns=3),
        "isa": lambda: _core.set_isa("none"),
        "isa of a number": lambda: _core.set_isa(3),
        "executor": lambda: _core.set_executor_address("x"),
        "no record": lambda: _core.inspect(b"x"),
        "no bytes": lambda: _core.inspect(3),
    }


def sweep(what: str) -> None:
    """Print the name of every call and how many of its allocations failed; then the places they came from."""
    places: set[int] = set()
    for name, call in {"working": working, "refused": refused}[what]().items():
        try:
            want: Any = plain(call())
        except Exception as error:
            want = type(error)
        assert isinstance(want, type) == (what == "refused"), (name, want)
        failures, references = 0, held()
        for error, place in every(call, PLAIN, module=MODULE):
            if what == "working":
                assert isinstance(error, (MemoryError, ImportError, NoneType)), (name, error)
                got = plain(call())
                same = np.allclose(got, want, rtol=1e-6, atol=0) if name == "attend" else got == want
                assert same, (name, got)  # attention over more queries adds in another order
            else:
                assert type(error) in (MemoryError, want), (name, error)
            failures += 1
            places.add(place)
        assert held() == references or name == "import", name
        print(name, failures)
    print("places", len(places))
