"""The golden records: the oracle and the C core write these bytes and read them back to these numbers, exactly."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from mixkvq import reference

pytest_plugins = ["core_fixtures"]
HERE = Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("golden_make", HERE / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)
FACTS = json.loads((HERE / "golden.json").read_text())
NAMES = sorted(make.CASES)


def stored(name):
    """The records of every head of a golden file, and their references."""
    data, records, heads = (HERE / f"{name}.bin").read_bytes(), [], make.HEADS.get(name, 1)
    while data:
        nbytes = int.from_bytes(data[20:24], "little")
        records.append(data[:nbytes])
        data = data[nbytes:]
    blocks, bits = len(records) // heads, FACTS[name]["mu"]
    mu = [None] * heads if bits is None else list(np.array(bits, np.uint16).view(np.float16).reshape(heads, -1))
    return [records[h * blocks : (h + 1) * blocks] for h in range(heads)], mu


def test_the_files_are_the_cases():
    assert {p.stem for p in HERE.glob("*.bin")} == set(NAMES) == set(FACTS)
    assert sum(p.stat().st_size for p in HERE.glob("*.bin")) < 200_000


def test_the_cases_cover_the_format():
    headers = [reference.parse(record) for name in NAMES for head in stored(name)[0] for record in head]
    coded = [h for h in headers if not h.exact]
    assert {tier for h in coded for tier in h.tiers} == {0, 1, 2, 3, 4, 5}
    assert {h.value_bits for h in coded} == {0, 1, 2, 3, 4, 8}
    assert {h.dtype for h in headers if h.exact} == {h.dtype for h in coded} == {"float32", "float16", "bfloat16"}
    for field in ("key_metadata", "value_metadata", "key_reference", "value_rotation"):
        assert len({getattr(h, field) for h in coded}) == 2, field
    assert max(sum(FACTS[name]["raised"]) for name in NAMES) > 0


@pytest.mark.parametrize("name", NAMES)
def test_oracle_packs_the_golden_bytes(name):
    codec, k, v, weight = make.case(name)
    records, mu, raised = reference.pack_heads(codec, k, v, weight)
    expected, expected_mu = stored(name)
    assert records == expected
    assert [n for head in raised for n in head] == FACTS[name]["raised"]
    assert [reference.parse(record).exact for head in records for record in head] == FACTS[name]["exact"]
    for got, want in zip(mu, expected_mu, strict=True):
        assert (got is None) == (want is None)
        assert got is None or (got == want).all()


@pytest.mark.parametrize("name", NAMES)
def test_oracle_unpacks_the_golden_values(name):
    assert make.digest(*stored(name)) == FACTS[name]["unpacked"]


@pytest.mark.parametrize("name", NAMES)
def test_core_packs_the_golden_bytes(name, isa):
    from mixkvq import arrays

    codec, k, v, weight = make.case(name)
    packed = arrays.pack(codec, k[None], v[None], importance=weight[None])
    expected, expected_mu = stored(name)
    assert packed.records[0] == expected
    assert packed.raised[0].reshape(-1).tolist() == FACTS[name]["raised"]
    for head, want in enumerate(expected_mu):
        if want is not None:
            assert packed.has_mu[0, head] == 1
            assert (packed.mu[0, head].view(np.uint16) == want.view(np.uint16)).all()


@pytest.mark.parametrize("name", NAMES)
def test_core_unpacks_the_golden_values(name, isa):
    from mixkvq import arrays

    pairs = [(record, mu) for head, mu in zip(*stored(name), strict=True) for record in head]
    parts = [x.tobytes() for record, mu in pairs for x in arrays.unpack(record, mu=mu)]
    assert hashlib.sha256(b"".join(parts)).hexdigest() == FACTS[name]["unpacked"]
